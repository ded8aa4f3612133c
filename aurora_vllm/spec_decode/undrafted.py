"""Requests that are answered without drafts, as by a vLLM that does not speculate.

With a draft configured vLLM refuses ``min_p`` and ``logit_bias``, which its V1 rejection sampler does not know, and a
seed no longer says what the answer is: how many random numbers a step takes depends on its drafts, and ours change.
None of this is a request's business. A request without drafts takes one token a step from vLLM's own sampler, which
knows both parameters and draws as it always does, also where others in the batch have drafts.

V2's rejection sampler applies both parameters to every row, so where its steps overlap, nothing but the refusal is in
the way. Where V1's do, proposals do not pass by the scheduler either; it schedules none for such requests.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def goes_without_drafts(params: Any) -> bool:
    """Whether a request's tokens have to be sampled one by one. params: vLLM's ``SamplingParams``.

    With a thinking budget V1 guesses, across drafts, how much of a forced end marker is out already, and tears one of
    several tokens apart. (V2 counts them right.)
    """
    is_seeded = params.seed is not None and params.temperature > 0
    has_budget = getattr(params, "thinking_token_budget", None) is not None
    return params.min_p > 0 or bool(params.logit_bias) or is_seeded or has_budget


def leave_out_drafts(proposals: Any, requests: Mapping[str, Any]) -> bool:
    """Empty the proposals for such requests, and cut those that would reach a request's ``min_tokens``, in place.

    vLLM forbids the end of an answer by the tokens there were before the step, so with ``min_tokens`` reached by
    accepted drafts the token after them still could not be the end.

    Args:
        proposals: vLLM's ``DraftTokenIds``.
        requests: vLLM's ``Request`` by id.

    Returns:
        Whether there are such requests, and no others.
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
    """Takes drafts away before they are scheduled.

    From everybody while somebody asks for ``logprob_token_ids``: beside a verified draft V1's sampler puts tables of
    two widths together and ends the engine, where others ask for logprobs, too, and V2's leaves them out.

    Args:
        one_by_one: also from each request that goes without drafts, because proposals do not pass by the scheduler.
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
        """Right before a step is scheduled, which may take up a request that nobody has seen run.

        Args:
            requests: vLLM's ``Request`` by id, those that wait included.
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
            made = kind(runner.vllm_config, runner.device, False)  # pinned memory is for those who are many
            group = processors.argmax_invariant if made.is_argmax_invariant() else processors.non_argmax_invariant
            group.append(made)


def accept_requests() -> None:
    """Lift vLLM's refusal, in the process that checks requests."""
    params = importlib.import_module("vllm.sampling_params").SamplingParams
    params._validate_spec_decode = lambda self, speculative_config: None
