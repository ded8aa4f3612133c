"""Who advises vLLM's scheduler: draft length, copied drafts, and which versions of the draft stay.

What a scheduler sees anyway, step times, proposals and verdicts, goes to the controllers of ``control/``; what they
decide stands in the control block. Everything that could fail here fails behind a circuit breaker: a step is scheduled
all the same.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aurora_vllm.control.profit import Decision, DraftLengthController
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.spec_decode.cached_prompts import CachedPrompts
from aurora_vllm.spec_decode.learner_share import LearnerShare
from aurora_vllm.spec_decode.proposals import Proposals
from aurora_vllm.spec_decode.rollback_watch import RollbackWatch
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment

TRUST_IN_A_GIVEN_DRAFT = 0.6  # conditional acceptance to assume of a draft the user names or resumes, until measured


class DraftLengthAdvisor:
    """Feeds the controllers from scheduler events and reports their decisions in the control block.

    Args:
        session: of this run.
        most_verified: tokens of a proposal that vLLM verifies; K and copies are no longer.
        no_copies: in words, why proposals cannot be replaced by copies; "" where they can.
        budget: tokens that vLLM schedules in a step; None for no bound.
        kv_cache_manager: vLLM's; None where there is nothing cached to look after.
    """

    def __init__(
        self,
        session: Session,
        most_verified: int,
        no_copies: str = "",
        budget: int | None = None,
        kv_cache_manager: Any = None,
    ) -> None:
        config = session.config
        max_draft_length = min(config.num_speculative_tokens, most_verified)
        self._control = ControlBlock.attach(Segment.attach(session.control))
        copied = min(config.prompt_lookup_tokens, most_verified)
        self._proposals = Proposals(self._control, copied, config.prompt_lookup_answers, no_copies, budget)
        self._cached_prompts: CachedPrompts | None = None
        if kv_cache_manager is not None and config.speculate != "never":
            self._cached_prompts = CachedPrompts(self._control.worker, kv_cache_manager)
        self._controller = DraftLengthController(
            max_draft_length=max_draft_length,
            mode=config.speculate,
            prior=TRUST_IN_A_GIVEN_DRAFT if config.draft or session.resume else 0.0,
            copies=self._proposals.copies,
        )
        # One for each job: work that goes well must not hide that other work never does.
        self._choosing = CircuitBreaker("choosing the draft length", on_failure=self._say_no_choice)
        self._measuring = CircuitBreaker("measuring steps")
        self._counting = CircuitBreaker("counting verdicts")
        self._learner_share = LearnerShare(config, self._control)
        self._rollback_watch = RollbackWatch(self._control, max_draft_length, config.rollback_confidence)
        self._max_draft_length = max_draft_length
        self._version = 0
        self._proposed_by = 0
        # When each step in flight was scheduled, and whether the learner worked then; two where steps overlap.
        self._started: deque[tuple[float, bool]] = deque()
        self._ended = 0.0
        self._learner_rests = config.learner_cpu_share <= 0.5  # mostly: else its work is how things are
        self._last = Decision(0, "")
        self._before = self._controller.acceptance  # what was known of the version before the live one

    def step_starts(self) -> None:
        """vLLM is about to schedule a step."""
        self._started.append((time.perf_counter(), self._learner_works()))
        self._control.scheduler.in_flight = len(self._started)
        if self._cached_prompts is not None:
            self._cached_prompts.look()

    def draft_length(self, batch_size: int) -> int:
        """K for the step being scheduled; 0 if choosing fails, or no request takes drafts."""
        if not self._choosing.run(lambda: self._decide(batch_size)) or self._proposals.for_nobody:
            return 0
        return self._last.draft_length

    def step_ends(self, scheduler_output: Any, sampled: list[list[int]]) -> None:
        """A step's results are in.

        Args:
            scheduler_output: vLLM's, of that step.
            sampled: the tokens each request gained, in the batch's order.
        """
        now = time.perf_counter()
        self._proposals.forget(scheduler_output.finished_req_ids)
        if not self._started:
            return
        started, worked = self._started.popleft()
        self._control.scheduler.in_flight = len(self._started)
        seconds = now - max(started, self._ended)  # a step waits until the one before it has ended
        self._ended = now
        beside_learner = worked or self._learner_works()
        self._measuring.run(lambda: self._observe_step(scheduler_output, sampled, seconds, beside_learner))

    def drafts_arrived(self, proposals: Any = None, requests: Mapping[str, Any] | None = None) -> None:
        """The drafts just taken from the worker were proposed by the version that is live now.

        Args:
            proposals: vLLM's ``DraftTokenIds``, where the scheduler is given any; edited in place.
            requests: vLLM's requests by id.
        """
        self._proposed_by = self._control.worker.live_version
        if proposals is not None and requests is not None:
            self._proposals.arrived(proposals, requests, self._controller.worth)

    def verified(self, num_drafts: int, num_accepted: int, request_id: str) -> None:
        """One request's proposal came back: of ``num_drafts`` tokens the target accepted ``num_accepted``."""
        copied = self._proposals.copied(request_id)
        self._counting.run(lambda: self._observe_verdict(num_drafts, num_accepted, copied))
        if not copied:
            self._rollback_watch.verified(self._proposed_by, num_drafts, num_accepted)
            self._controller.wants_verdicts = self._rollback_watch.wants_verdicts

    def _learner_works(self) -> bool:
        """Whether the learner is in a burst of work; one that was killed in a burst still says so."""
        learner = self._control.learner
        return bool(learner.working and learner.pid and learner.pid == self._control.server.learner_pid)

    def _say_no_choice(self, message: str) -> None:
        self._last = replace(self._last, draft_length=0, reason=f"choosing the draft length failed: {message}")
        self._control.scheduler.draft_length, self._control.scheduler.reason = 0, self._last.reason

    def _decide(self, batch_size: int) -> None:
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
        if decision.draft_length != self._last.draft_length:
            scheduler.draft_length = decision.draft_length
        if decision.reason != self._last.reason:
            scheduler.reason = decision.reason
        if decision.sits_out != self._last.sits_out:
            scheduler.draft_sits_out = decision.sits_out
        self._last = decision

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
        verified = sum(map(len, drafts.values()))
        proposed = scheduler_output.num_spec_tokens_to_schedule
        accepted = sum(max(len(tokens) - 1, 0) for tokens in sampled)
        self._learner_share.earned(seconds, self._controller.saved(len(counts), proposed, verified, accepted))
        # Only steps of nothing but decoding tell what K costs. What a burst of the learner's adds to a step is no
        # property of K; of two draft lengths it would hit the one being probed.
        if sum(counts.values()) != len(counts) + verified:
            return
        if not (self._learner_rests and beside_learner):
            self._controller.costs.observe(len(counts), proposed, verified, seconds)
        self._learner_share.decoded(len(counts), verified, seconds, beside_learner)

    def _observe_verdict(self, num_drafts: int, num_accepted: int, copied: bool) -> None:
        if copied:  # says nothing of any version
            scheduler = self._control.scheduler
            scheduler.copied_drafts += 1
            scheduler.copied_tokens += num_drafts
            scheduler.copied_accepted += num_accepted
            return
        self._controller.acceptance.observe(num_drafts, num_accepted)
        per_position = [int(num_accepted > i) for i in range(self._max_draft_length)]
        self._control.scheduler.record(self._proposed_by, 1, num_drafts, num_accepted, per_position)
