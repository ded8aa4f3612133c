"""vLLM's scheduler with a draft length chosen at run time (``--scheduler-cls``).

vLLM can look K up by batch size (dynamic speculative decoding, ``dynamic_sd_lookup``); the lookup table is replaced by
the controller. What the scheduler sees anyway, verdicts and step times, is what the controller decides on.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from aurora_vllm.control.guard import LearnerGuard
from aurora_vllm.control.profit import Decision, DraftLengthController
from aurora_vllm.control.rollout import Rollout
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment

WORDS_EVERY = 20  # verified drafts between two accounts of a probation
TRUST_IN_A_GIVEN_DRAFT = 0.6  # conditional acceptance to assume of a draft the user names or resumes, until measured


class _ChosenDraftLength:
    """Stands where vLLM keeps its table of K by batch size."""

    def __init__(self, advisor: DraftLengthAdvisor) -> None:
        self._advisor = advisor

    def __getitem__(self, batch_size: int) -> int:
        return self._advisor.draft_length(batch_size)


class DraftLengthAdvisor:
    """Feeds the controller from scheduler events and reports its decisions in the control block."""

    def __init__(self, session: Session, max_draft_length: int) -> None:
        config = session.config
        self._control = ControlBlock.attach(Segment.attach(session.control))
        self._controller = DraftLengthController(
            max_draft_length=max_draft_length,
            mode=config.speculate,
            prior=TRUST_IN_A_GIVEN_DRAFT if config.draft or session.resume else 0.0,
        )
        self._breaker = CircuitBreaker("choosing the draft length")
        self._guard = LearnerGuard(config.learner_slowdown) if config.learner_slowdown else None
        self._control.scheduler.learner_share = 1.0
        self._control.scheduler.learner_guard = self._guard.reason if self._guard else "off by the settings"
        self._cost = CircuitBreaker("watching what the learner costs")
        self._rollout = Rollout(max_draft_length, config.rollback_confidence)
        self._watch = CircuitBreaker("watching a new version")
        self._max_draft_length = max_draft_length
        self._version = 0
        self._proposed_by = 0
        # When each step in flight was scheduled, and whether the learner worked then; two where steps overlap.
        self._started: deque[tuple[float, bool]] = deque()
        self._ended = 0.0
        self._learner_rests = config.learner_cpu_share <= 0.5  # mostly: else its work is how things are
        self._last = Decision(0, "")
        self._standing = (0, "")
        self._before = self._controller.acceptance  # what was known of the version before the live one

    def step_starts(self) -> None:
        self._started.append((time.perf_counter(), self._control.learner.working))

    def draft_length(self, batch_size: int) -> int:
        """K for the step being scheduled; 0 if choosing fails."""
        decision = [Decision(0, "choosing the draft length failed")]
        self._breaker.run(lambda: decision.__setitem__(0, self._decide(batch_size)))
        return decision[0].draft_length

    def step_ends(self, scheduler_output: Any, sampled: list[list[int]]) -> None:
        """A step's results are in. sampled: the tokens each request gained."""
        now = time.perf_counter()
        if not self._started:
            return
        started, worked = self._started.popleft()
        seconds = now - max(started, self._ended)  # a step waits until the one before it has ended
        self._ended = now
        beside_learner = worked or self._control.learner.working
        self._breaker.run(lambda: self._observe_step(scheduler_output, sampled, seconds, beside_learner))

    def drafts_arrived(self) -> None:
        """The drafts just taken from the worker were proposed by the version that is live now."""
        self._proposed_by = self._control.worker.live_version

    def verified(self, num_drafts: int, num_accepted: int) -> None:
        """One request's drafts came back."""
        self._breaker.run(lambda: self._observe_verdict(num_drafts, num_accepted))
        self._watch.run(lambda: self._judge_version(num_drafts, num_accepted))

    def _decide(self, batch_size: int) -> Decision:
        live = self._control.worker.live_version
        learner = self._control.learner
        if live != self._version:
            if live < self._version:  # a rollback: what its successor did says nothing of it
                self._controller.acceptance = self._before
            else:
                self._before = copy.deepcopy(self._controller.acceptance)
                self._controller.acceptance.new_version()
            self._version = live
        if learner.shadow_version == live and learner.shadow_steps > 0:
            self._controller.acceptance.shadow(learner.shadow_accepted_per_position)
        decision = self._controller.decide(batch_size)
        scheduler = self._control.scheduler
        scheduler.beat()
        if decision.draft_length != self._last.draft_length:
            scheduler.draft_length = decision.draft_length
        if decision.reason != self._last.reason:
            scheduler.reason = decision.reason
        self._last = decision
        return decision

    def _observe_step(
        self, scheduler_output: Any, sampled: list[list[int]], seconds: float, beside_learner: bool
    ) -> None:
        counts = scheduler_output.num_scheduled_tokens
        if not counts:
            return
        scheduler = self._control.scheduler
        scheduler.steps += 1
        scheduler.generated_tokens += sum(len(tokens) for tokens in sampled)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if drafts:
            scheduler.spec_steps += 1
        # Only steps that verified as many drafts as they proposed, and held no prompt, tell what K costs. What a burst
        # of the learner's adds to a step is no property of K; of two draft lengths it would hit the one being probed.
        proposed = scheduler_output.num_spec_tokens_to_schedule
        if not all(counts[name] == 1 + proposed == 1 + len(drafts.get(name, ())) for name in counts):
            return
        if not (self._learner_rests and beside_learner):
            self._controller.times.observe(len(counts), proposed, seconds)
        if (guard := self._guard) is not None:
            self._cost.run(lambda: self._judge_learner(guard, len(counts), proposed, seconds, beside_learner))

    def _judge_learner(
        self, guard: LearnerGuard, batch_size: int, drafts: int, seconds: float, beside_learner: bool
    ) -> None:
        """Does the learner slow serving too much? It reads its share from here."""
        scheduler = self._control.scheduler
        if guard.observe(batch_size, drafts, seconds, beside_learner):
            scheduler.learner_share, scheduler.learner_slowdown = guard.share, guard.slowdown
            scheduler.learner_guard = guard.reason

    def _observe_verdict(self, num_drafts: int, num_accepted: int) -> None:
        self._controller.acceptance.observe(num_drafts, num_accepted)
        per_position = [int(num_accepted > i) for i in range(self._max_draft_length)]
        self._control.scheduler.record(self._proposed_by, 1, num_drafts, num_accepted, per_position)

    def _judge_version(self, num_drafts: int, num_accepted: int) -> None:
        """Is the newest version worse than the one before? The worker has both, so it is asked to trade them."""
        rollout, scheduler = self._rollout, self._control.scheduler
        rollout.observe(self._proposed_by, self._control.worker.previous_version, num_drafts, num_accepted)
        standing = (rollout.version, rollout.decision)
        if standing == self._standing and (rollout.decision != "undecided" or rollout.drafts % WORDS_EVERY):
            return
        self._standing = standing
        self._controller.wants_verdicts = rollout.looks_worse
        scheduler.probation_version, scheduler.probation = rollout.version, rollout.reason
        scheduler.probation_drafts, scheduler.probation_evidence = rollout.drafts, rollout.evidence
        if rollout.decision == "rollback":
            scheduler.roll_back_version = rollout.version  # last: whoever finds it finds the reason


def advise(scheduler: Any) -> DraftLengthAdvisor | None:
    """Who chooses K for a vLLM scheduler, put where it looks K up; None where there is no session or no drafts."""
    session = Session.from_environment()
    if session is None or not scheduler.num_spec_tokens:
        return None
    advisor = DraftLengthAdvisor(session, scheduler.num_spec_tokens)
    scheduler.dynamic_sd_lookup = _ChosenDraftLength(advisor)
    return advisor


class AuroraScheduler(Scheduler):
    """Plain vLLM scheduling; only K is chosen step by step.

    vLLM takes a scheduler class by name and does not say which of its two kinds the configuration needs. Where steps
    overlap (async scheduling, vLLM's default on a GPU) drafts never come back to the scheduler, so a synchronous one
    would never verify any: there an :class:`AsyncAuroraScheduler` is made instead.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> AuroraScheduler:
        return super().__new__(AsyncAuroraScheduler if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._advisor = advise(self)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._advisor is not None:
            self._advisor.step_starts()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._advisor is not None:
            self._advisor.step_ends(scheduler_output, model_runner_output.sampled_token_ids)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        if self._advisor is not None:
            self._advisor.drafts_arrived()
        super().update_draft_token_ids(draft_token_ids)

    def make_spec_decoding_stats(self, *args: Any, **kwargs: Any) -> Any:
        if self._advisor is not None and kwargs.get("num_draft_tokens"):
            self._advisor.verified(kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"])
        return super().make_spec_decoding_stats(*args, **kwargs)


class AsyncAuroraScheduler(AuroraScheduler, AsyncScheduler):
    """The same for overlapping steps.

    The scheduler sees no drafts, only verdicts on them. When it looks at step N's, the worker may be in step N + 1
    already, so a verdict on the first drafts of a new version may be booked on the version before it: one step's worth.
    """

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._advisor is not None:
            self._advisor.drafts_arrived()  # what the next results judge was proposed by now
        return outputs
