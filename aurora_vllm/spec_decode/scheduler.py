"""vLLM's scheduler with a draft length chosen at run time (``--scheduler-cls``).

vLLM can look up K by batch size (dynamic speculative decoding, ``dynamic_sd_lookup``); the table is replaced by the
controller, which decides on what the scheduler sees anyway: verdicts and step times.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from aurora_vllm.parent import end_with_parent
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.undrafted import Withdrawal
from aurora_vllm.transport.segment import owner_is_alive, owner_pid


class _ChosenDraftLength:
    """Takes the place of vLLM's table of K by batch size."""

    def __init__(self, advisor: SpeculationAdvisor) -> None:
        self._advisor = advisor

    def __getitem__(self, batch_size: int) -> int:
        return self._advisor.draft_length(batch_size)


def advise(scheduler: Any) -> SpeculationAdvisor | None:
    """Give a vLLM scheduler an advisor, in place of its table of K. None without a session or without drafts."""
    session = Session.from_environment()
    if session is None or not scheduler.num_spec_tokens:
        return None
    _end_with_server(session)
    no_copies, lengths = (
        _copying(scheduler.vllm_config) if session.config.prompt_lookup else ("off by the settings", ())
    )
    overlapping = scheduler.vllm_config.scheduler_config.async_scheduling
    advisor = SpeculationAdvisor(
        session,
        scheduler.num_spec_tokens,
        no_copies,
        getattr(scheduler, "max_num_scheduled_tokens", None),
        getattr(scheduler, "kv_cache_manager", None),
        lengths,
        overlapping,
        Withdrawal(one_by_one=overlapping and not scheduler.vllm_config.use_v2_model_runner),
    )
    scheduler.dynamic_sd_lookup = _ChosenDraftLength(advisor)
    return advisor


def _end_with_server(session: Session) -> None:
    """Have vLLM's engine, whose process this is, end with the server. It would outlive a server that is killed (kill
    -9, out of memory), with the model in memory. Its workers end with it."""
    server = owner_pid(session.control)
    is_child = os.getppid() == server and end_with_parent(server)
    if not is_child and not owner_is_alive(session.control):  # the server was killed while the model was loaded
        raise SystemExit(1)


def _copying(vllm_config: Any) -> tuple[str, tuple[int, ...]]:
    """Why the scheduler makes no copies, "" if it does; and the lengths of proposals where the worker makes them."""
    if vllm_config.speculative_config.draft_sample_method != "greedy":
        return "off: drafts are sampled, and a copy has no probabilities", ()
    if vllm_config.use_v2_model_runner:  # it verifies its own drafts, whatever the scheduler holds
        return "off: the worker, which copies here, has not begun", _lengths(vllm_config.speculative_config)
    if vllm_config.scheduler_config.async_scheduling:
        return "off: steps overlap, so drafts do not pass through the scheduler", ()
    return "", ()


def _lengths(speculative_config: Any) -> tuple[int, ...]:
    """The draft lengths in vLLM's table, for which it captures CUDA graphs; all lengths where there is no table."""
    table = getattr(speculative_config, "num_speculative_tokens_per_batch_size", None)
    most = speculative_config.num_speculative_tokens
    return tuple(sorted({length for *_, length in table or ()} - {0})) or tuple(range(1, most + 1))


class AuroraScheduler(Scheduler):
    """vLLM's scheduler; only K is chosen anew for each step.

    vLLM takes a scheduler class by name, and does not choose between its two kinds then. Where steps overlap (async
    scheduling, vLLM's default on a GPU) drafts never come back to the scheduler, so a synchronous one would not verify
    any: there an :class:`AsyncAuroraScheduler` is made instead.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> AuroraScheduler:
        return super().__new__(AsyncAuroraScheduler if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._advisor = advise(self)

    def add_request(self, request: Any) -> None:
        if self._advisor is not None:
            self._advisor.request_arrives(request, self.requests.get(request.request_id))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._advisor is not None:
            self._advisor.step_starts(self.requests)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._advisor is not None:
            self._advisor.step_ends(scheduler_output, model_runner_output.sampled_token_ids)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        if self._advisor is not None:
            self._advisor.drafts_arrived(draft_token_ids, self.requests)
        super().update_draft_token_ids(draft_token_ids)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        if self._advisor is not None and kwargs.get("num_draft_tokens"):
            self._advisor.verified(kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"], kwargs["request_id"])
        return super().make_spec_decoding_stats(*args, **kwargs)


class AsyncAuroraScheduler(AuroraScheduler, AsyncScheduler):
    """The same for overlapping steps.

    The scheduler sees no drafts, only verdicts. When it gets those of step N, the worker may already be in step N + 1,
    so verdicts on the first drafts of a new version may be attributed to the version before, for one step.
    """
