"""Requests that are answered without drafts, as by a vLLM that does not speculate.

With a draft configured vLLM refuses ``min_p`` and ``logit_bias``, which its V1 rejection sampler does not support. And
a seed no longer determines the answer, because the random numbers a step takes depend on its drafts, and ours change.
Clients should not notice either. A request without drafts takes one token a step from vLLM's own sampler, which
supports both parameters and draws as always, even if other requests in the batch have drafts.

V2's rejection sampler applies both parameters to every row, so where its steps overlap only the refusal has to go.
Where V1's steps overlap, proposals do not pass through the scheduler; it schedules none for such requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def goes_without_drafts(params: Any) -> bool:
    """Whether a request's tokens have to be sampled one by one. params: vLLM's ``SamplingParams``.

    With a thinking budget and drafts, V1 guesses how much of a forced end marker was emitted already, and breaks up a
    marker of several tokens. (V2 counts them correctly.)
    """
    is_seeded = params.seed is not None and params.temperature > 0
    has_budget = getattr(params, "thinking_token_budget", None) is not None
    return params.min_p > 0 or bool(params.logit_bias) or is_seeded or has_budget


def leave_out_drafts(proposals: Any, requests: Mapping[str, Any]) -> bool:
    """Empty the proposals of such requests, and cut those that would reach a request's ``min_tokens``, in place.

    vLLM forbids the end of an answer according to the number of tokens before the step. If accepted drafts reach
    ``min_tokens``, the token after them still could not be the end.

    Args:
        proposals: vLLM's ``DraftTokenIds``.
        requests: vLLM's ``Request`` by id.

    Returns:
        Whether all running requests are such (and there are some).
    """
    found = others = 0
    for i, name in enumerate(proposals.req_ids):
        request = requests.get(name)
        if request is not None and goes_without_drafts(request.sampling_params):
            proposals.draft_token_ids[i] = []
            found += 1
            continue
        others += 1
        if request is not None and (least := request.sampling_params.min_tokens) > request.num_output_tokens:
            del proposals.draft_token_ids[i][least - request.num_output_tokens - 1 :]
    return found > 0 and not others


class Withdrawal:
    """Removes drafts before they are scheduled.

    From all requests while one asks for ``logprob_token_ids``: in a step with drafts, V2's sampler leaves these out,
    and V1's, if other requests ask for logprobs, combines tables of two widths and ends the engine.

    Args:
        one_by_one: also from each request that goes without drafts, where proposals do not pass through the scheduler.
    """

    def __init__(self, one_by_one: bool = False) -> None:
        self._one_by_one = one_by_one
        self._asking: set[str] = set()
        self._without: set[str] = set()

    def arrived(self, request: Any) -> None:
        """A vLLM ``Request`` came to the scheduler."""
        params = request.sampling_params
        if getattr(params, "logprob_token_ids", None):
            self._asking.add(request.request_id)
        if self._one_by_one and params is not None and goes_without_drafts(params):
            self._without.add(request.request_id)

    def withdraw(self, requests: Mapping[str, Any]) -> None:
        """Called right before a step is scheduled, which may start a waiting request.

        Args:
            requests: vLLM's ``Request`` by id, waiting ones included.
        """
        self._asking &= requests.keys()
        self._without &= requests.keys()
        for name in requests if self._asking else self._without:
            requests[name].spec_token_ids = []


def add_logits_processors(runner: Any) -> None:
    """Give a V1 runner the processors of both parameters, which vLLM leaves out where it speculates
    (``vllm.v1.sample.logits_processor.build_logitsprocs``)."""
    builtin = importlib.import_module("vllm.v1.sample.logits_processor.builtin")
    processors = runner.input_batch.logitsprocs
    for kind in (builtin.MinPLogitsProcessor, builtin.LogitBiasLogitsProcessor):
        if not any(isinstance(one, kind) for one in processors.all):
            made = kind(runner.vllm_config, runner.device, False)  # without pinned memory: such requests are rare
            group = processors.argmax_invariant if made.is_argmax_invariant() else processors.non_argmax_invariant
            group.append(made)


def accept_requests() -> None:
    """Disable vLLM's refusal, in the process that validates requests."""
    params = importlib.import_module("vllm.sampling_params").SamplingParams
    params._validate_spec_decode = lambda self, speculative_config: None
