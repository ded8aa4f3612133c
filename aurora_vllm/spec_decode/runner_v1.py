"""vLLM's V1 runner (GPUModelRunner and its CPU subclass) -> StepTrace.

Three attributes of the *instance* are wrapped; the class stays as it is. Every wrapper calls the original and returns
its result unchanged:

- ``sample_tokens``: keeps the step's ``execute_model_state``, which vLLM clears before it samples;
- ``_sample``: has the verdict; it runs in every step, also near ``max_model_len``, where vLLM does not draft;
- ``propose_draft_token_ids``: notes which weights propose, and skips the draft model where K is 0.

A fork of vLLM with ``patches/vllm-VERSION.patch`` calls a ``step_observer`` instead; there nothing is wrapped.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from aurora_vllm.spec_decode.trace import StepTrace
from aurora_vllm.spec_decode.wrap import OnStep, wrap


class V1Adapter:
    """Wraps one V1 runner.

    Args:
        runner: vLLM's ``GPUModelRunner`` after ``load_model``.
        on_step: receives, for every sampled step, a function that builds its StepTrace; must not raise.
        on_propose: called before drafts are proposed; returns the version of the weights that propose.
        sits_out: whether the draft need not run over prompts where K is 0.
    """

    model_runner = "V1"

    def __init__(
        self, runner: Any, on_step: OnStep, on_propose: Callable[[], int], sits_out: Callable[[], bool]
    ) -> None:
        self._runner = runner
        self._on_step = on_step
        self._on_propose = on_propose
        self._sits_out = sits_out
        self._state: Any = None
        self._proposed_by = on_propose()
        if hasattr(runner, "step_observer"):
            runner.step_observer = self
            return
        self._propose_signature = inspect.signature(runner.propose_draft_token_ids)
        runner.sample_tokens = wrap(runner.sample_tokens, self._sample_tokens)
        runner._sample = wrap(runner._sample, self._sample)
        runner.propose_draft_token_ids = wrap(runner.propose_draft_token_ids, self._propose)

    def _sample_tokens(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._state = self._runner.execute_model_state
        try:
            return original(*args, **kwargs)
        finally:
            self._state = None

    def _sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self._state is not None:
            self.sampled(self._state, output)
        return output

    def _propose(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = self._propose_signature.bind_partial(*args, **kwargs).arguments.get("scheduler_output")
        nothing = self.proposing(step)
        return original(*args, **kwargs) if nothing is None else nothing

    def sampled(self, state: Any, output: Any) -> None:
        """A step's verdict is known. state: its ``ExecuteModelState``; output: its ``SamplerOutput``."""
        self._on_step(functools.partial(self._trace, state, output))

    def proposing(self, step: Any) -> torch.Tensor | None:
        """Drafts are about to be proposed. For a step that needs none, returns empty ones, int64 [R, 0]; else None."""
        self._proposed_by = self._on_propose()
        if getattr(self._runner, "use_async_scheduling", False):
            return None  # where steps overlap, proposing also passes the sampled tokens on to the next step
        if step is None or step.num_spec_tokens_to_schedule or (_has_prefill(step) and not self._sits_out()):
            return None
        # vLLM would still run the draft over the step's tokens to keep its KV cache complete. That is not worth it for
        # decode steps without drafting. For prompts it is, because prefix caching reuses them, unless drafting is far
        # off.
        return torch.empty(len(self._runner.input_batch.req_ids), 0, dtype=torch.int64, device=self._runner.device)

    def _trace(self, state: Any, output: Any) -> StepTrace:
        runner = self._runner
        request_ids = list(runner.input_batch.req_ids)
        step = state.scheduler_output
        drafts = step.scheduled_spec_decode_tokens
        total = step.total_num_scheduled_tokens
        discarded = runner.discard_request_mask.np
        return StepTrace(
            request_ids=request_ids,
            lengths=[step.num_scheduled_tokens[name] for name in request_ids],
            num_drafts=[len(drafts.get(name, ())) for name in request_ids],
            emits=[not discarded[i] for i in range(len(request_ids))],
            token_ids=runner.input_ids.gpu[:total],
            positions=runner._get_positions(total),
            aux_hidden_states=state.aux_hidden_states or (),
            last_hidden_states=state.hidden_states,
            sampled=output.sampled_token_ids,
            draft_version=self._proposed_by,
        )


def _has_prefill(step: Any) -> bool:
    drafts = step.scheduled_spec_decode_tokens
    return any(count - len(drafts.get(name, ())) > 1 for name, count in step.num_scheduled_tokens.items())
