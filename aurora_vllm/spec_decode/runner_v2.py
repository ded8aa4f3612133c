"""vLLM's V2 runner (vllm/v1/worker/gpu/model_runner.py) -> StepTrace.

Two attributes of *instances* are wrapped; the classes stay as they are. Both wraps pass the original's result on, but
where nobody drafts the draft model is done without, and proposals are replaced by copies where those are expected to be
better:

- ``runner.sample`` knows the batch, the last hidden states (what ``lm_head`` reads, also where a target feeds its draft
  something else) and the verdict,
- ``runner.speculator.propose`` gets the auxiliary states. It runs once in every sampled step, so the step's record is
  made there, before the draft runs: what a full CUDA graph left in its buffers is overwritten by the next step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aurora_vllm.spec_decode.trace import StepTrace
from aurora_vllm.spec_decode.wrap import OnStep, wrap

if TYPE_CHECKING:
    from aurora_vllm.spec_decode.device_copying import DeviceCopying


class V2Adapter:
    """Wraps one V2 runner.

    Args:
        runner: vLLM's ``GPUModelRunner`` of ``vllm.v1.worker.gpu`` after ``load_model``, with a speculator.
        on_step: receives, for every sampled step, a function that builds its StepTrace; must not raise.
        on_propose: called before drafts are proposed; returns the version of the weights the draft runs with now.
        sits_out: whether the draft need not see prompts where it does not draft.
    """

    model_runner = "V2"
    copying: DeviceCopying | None = None  # set where proposals may be copies

    def __init__(
        self, runner: Any, on_step: OnStep, on_propose: Callable[[], int], sits_out: Callable[[], bool]
    ) -> None:
        self._speculator = runner.speculator
        self._on_step = on_step
        self._on_propose = on_propose
        self._sits_out = sits_out
        self._sampled: tuple[torch.Tensor, Any, Any] | None = None
        self._proposed_by = on_propose()
        self._propose_signature = inspect.signature(runner.speculator.propose)
        runner.sample = wrap(runner.sample, self._sample)
        runner.speculator.propose = wrap(runner.speculator.propose, self._propose)

    def _sample(self, original: Callable[..., Any], hidden_states: Any, input_batch: Any, *args: Any, **kw: Any) -> Any:
        result = original(hidden_states, input_batch, *args, **kw)
        self._sampled = hidden_states, input_batch, result[0]
        return result

    def _propose(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self._propose_signature.bind_partial(*args, **kwargs).arguments
        sampled, self._sampled = self._sampled, None
        if sampled is None or given.get("dummy_run") or given.get("is_profile"):
            return original(*args, **kwargs)  # nothing was sampled: vLLM profiles, warms up or captures graphs
        self._on_step(functools.partial(self._trace, *sampled, given.get("aux_hidden_states")))
        self._proposed_by = self._on_propose()
        batch, length = sampled[1], given.get("num_speculative_tokens")
        copying = self.copying if "num_speculative_tokens" in kwargs else None
        drafts = length != 0 and (copying is None or copying.beside_drafts)
        if drafts:
            proposed = original(*args, **kwargs)
        elif batch.has_prefill and not self._sits_out():
            proposed = original(*args, **kwargs | {"num_speculative_tokens": 0} if copying is not None else kwargs)
        else:
            # vLLM would still run the draft once to keep its KV cache complete. A decode step that nobody drafts from
            # does not pay for that; prompts do, because prefix caching hands them on, unless drafting is far off. -1
            # is "no draft" to vLLM.
            proposed = self._speculator.draft_tokens[: batch.num_reqs].fill_(-1)
        if copying is not None:
            copying.replace(batch, given, proposed, self._proposed_by if drafts else None)
        return proposed

    def _trace(self, last_hidden_states: torch.Tensor, batch: Any, output: Any, aux_hidden_states: Any) -> StepTrace:
        drafts = batch.num_draft_tokens_per_req
        lengths = batch.num_scheduled_tokens
        return StepTrace(
            request_ids=batch.req_ids,
            lengths=lengths.tolist(),
            num_drafts=[0] * batch.num_reqs if drafts is None else drafts.tolist(),
            emits=emitting(batch).tolist(),
            token_ids=batch.input_ids[: batch.num_tokens],
            positions=batch.positions[: batch.num_tokens],
            aux_hidden_states=aux_hidden_states or (),
            last_hidden_states=last_hidden_states,
            sampled=emitted_tokens(output.sampled_token_ids, output.num_sampled),
            draft_version=self._proposed_by,
        )


def emitting(batch: Any) -> np.ndarray:
    """Which requests of a vLLM ``InputBatch`` emit something in its step, and are not inside their prompts. bool [R]

    vLLM samples in every request and throws away what comes out inside a prompt, by this same comparison
    (input_batch.py, _get_num_sampled_and_rejected_kernel, there on the device).
    """
    emits: np.ndarray = batch.num_computed_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
    return emits


def emitted_tokens(sampled: torch.Tensor, num_sampled: torch.Tensor) -> torch.Tensor:
    """V2's sampled tokens in V1's form, -1 behind what counts; V2 leaves there what was in memory.

    Args:
        sampled: [R, C] integer.
        num_sampled: [R] integer, accepted drafts and the token after them.

    Returns:
        [R, C], dtype of sampled, on its device.
    """
    columns = torch.arange(sampled.shape[1], device=sampled.device)
    return sampled.masked_fill(columns >= num_sampled[:, None], -1)
