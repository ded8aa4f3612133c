"""Advises vLLM's scheduler: on the draft length, on copies, and on whether a version of the draft stays.

What a scheduler sees anyway (step times, proposals, verdicts) goes to the controllers of ``control/``; their decisions
are written into the control block. Whatever could fail here is behind a circuit breaker, so that a step is scheduled in
any case.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from aurora_vllm.control.acceptance import Verdicts
from aurora_vllm.control.decision import Decision
from aurora_vllm.control.profit import DraftLengthController
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.spec_decode.cached_prompts import CachedPrompts
from aurora_vllm.spec_decode.consent import note_salt
from aurora_vllm.spec_decode.copy_evidence import CopyEvidence
from aurora_vllm.spec_decode.learner_share import LearnerShare
from aurora_vllm.spec_decode.proposals import Proposals
from aurora_vllm.spec_decode.rollback_watch import RollbackWatch
from aurora_vllm.spec_decode.steps_in_flight import Step, StepsInFlight
from aurora_vllm.spec_decode.undrafted import Withdrawal
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment

TRUST_IN_A_GIVEN_DRAFT = 0.6  # conditional acceptance to assume of a given or resumed draft until it is measured


class SpeculationAdvisor:
    """Feeds the controllers from scheduler events and reports their decisions in the control block.

    Args:
        session: of this run.
        most_verified: the longest proposal that vLLM verifies; bounds K and copies.
        no_copies: why proposals cannot be replaced by copies, in words; "" where they can.
        budget: the most tokens that vLLM schedules in a step; None for no bound.
        kv_cache_manager: vLLM's; None where no cached prompts need to be forgotten.
        lengths: where the worker makes copies, the lengths that a batch's proposals may have, ascending; else empty.
        overlapping: whether steps overlap (vLLM's async scheduling), so that proposals bypass the scheduler.
        withdrawal: takes drafts away before they are scheduled.
    """

    def __init__(
        self,
        session: Session,
        most_verified: int,
        no_copies: str = "",
        budget: int | None = None,
        kv_cache_manager: Any = None,
        lengths: tuple[int, ...] = (),
        overlapping: bool = False,
        withdrawal: Withdrawal | None = None,
    ) -> None:
        config = session.config
        max_draft_length = min(config.num_speculative_tokens, most_verified)
        self._control = ControlBlock.attach(Segment.attach(session.control))
        copied = min(config.prompt_lookup_tokens, most_verified)
        self._proposals = Proposals(self._control, copied, config.prompt_lookup_answers, no_copies, budget)
        self._cached_prompts: CachedPrompts | None = None
        if kv_cache_manager is not None and config.speculate != "never":
            self._cached_prompts = CachedPrompts(self._control.worker, kv_cache_manager)
        self._evidence = CopyEvidence(self._control, most_verified, self._take_verdicts) if lengths else None
        self._controller = DraftLengthController(
            max_draft_length=max_draft_length,
            mode=config.speculate,
            prior=TRUST_IN_A_GIVEN_DRAFT if config.draft or session.resume else 0.0,
            copies=self._proposals.copies,
            lengths=lengths,
        )
        # One for each job: a job that succeeds must not hide that another one always fails.
        self._choosing = CircuitBreaker("choosing the draft length", on_failure=self._say_no_choice)
        self._measuring = CircuitBreaker("measuring steps")
        self._counting = CircuitBreaker("counting verdicts")
        self._reading = CircuitBreaker("reading the worker's counts")
        self._learner_share = LearnerShare(config, self._control)
        self._rollback_watch = RollbackWatch(self._control, max_draft_length, config.rollback_confidence)
        self._max_draft_length = max_draft_length
        self._budget, self._lengths = budget, lengths
        self._overlapping, self._withdrawal = overlapping, withdrawal or Withdrawal()
        self._version = 0
        self._proposed_by = 0
        self._steps = StepsInFlight(self._control)
        self._learner_rests = config.learner_cpu_share <= 0.5  # if not, steps beside its work are the normal case
        self._last = Decision(0, "")
        self._before = self._controller.acceptance  # acceptance of the version before the live one

    def request_arrives(self, request: Any, before: Any = None) -> None:
        """A vLLM ``Request`` reaches the scheduler. before: the request of the same id that it continues, if any."""
        note_salt(request, before)
        self._withdrawal.arrived(request)

    def step_starts(self, requests: Mapping[str, Any] | None = None) -> None:
        """vLLM is about to schedule a step. requests: vLLM's by id, waiting ones included."""
        self._withdrawal.withdraw(requests or {})
        self._steps.begin()
        if self._cached_prompts is not None:
            self._cached_prompts.look()

    def draft_length(self, batch_size: int) -> int:
        """Length of the proposals of the step being scheduled; 0 if choosing fails, or if no request takes drafts."""
        if not self._choosing.run(lambda: self._decide(batch_size)) or self._proposals.for_nobody:
            return 0
        proposed = self._fitting(self._last.proposed, batch_size)
        self._steps.drafts(min(self._last.draft_length, proposed))
        return proposed

    def _fitting(self, proposed: int, batch_size: int) -> int:
        """Where proposals cannot be cut one by one: a length that leaves half of a step's tokens to waiting requests.
        vLLM fills a step in the order of requests, so otherwise the last ones would wait until the first have ended."""
        if not self._lengths or not self._budget:
            return proposed
        room = self._budget // (2 * batch_size) - 1
        return proposed if proposed <= room else max((n for n in self._lengths if n <= room), default=0)

    def step_ends(self, scheduler_output: Any, sampled: list[list[int]]) -> None:
        """A step's results are in.

        Args:
            scheduler_output: vLLM's, of that step.
            sampled: tokens that each request gained, in the batch's order.
        """
        step = self._steps.end()
        self._proposals.forget(scheduler_output.finished_req_ids)
        if self._overlapping:
            self.drafts_arrived()  # what the next results judge was proposed by now
        if step is None:
            return
        self._measuring.run(lambda: self._observe(step, scheduler_output, sampled))
        if (evidence := self._evidence) is not None:
            self._reading.run(evidence.look)

    def drafts_arrived(self, proposals: Any = None, requests: Mapping[str, Any] | None = None) -> None:
        """Proposals came from the worker, made by the version that is live now.

        Args:
            proposals: vLLM's ``DraftTokenIds``, edited in place; None where they do not pass through the scheduler.
            requests: vLLM's requests by id.
        """
        self._proposed_by = self._control.worker.live_version
        if proposals is not None and requests is not None:
            self._proposals.arrived(proposals, requests, self._controller.worth)

    def verified(self, num_drafts: int, num_accepted: int, request_id: str) -> None:
        """One request's verdict: of ``num_drafts`` proposed tokens the target accepted ``num_accepted``."""
        if self._evidence is not None and self._evidence.copies is not None:
            return  # the worker counts the same verdicts, and knows who proposed
        version = None if self._proposals.copied(request_id) else self._proposed_by
        self._take_verdicts(version, {(num_drafts, num_accepted): 1})

    def _say_no_choice(self, message: str) -> None:
        self._last = replace(
            self._last, draft_length=0, proposed=0, reason=f"choosing the draft length failed: {message}"
        )
        self._control.scheduler.draft_length, self._control.scheduler.reason = 0, self._last.reason

    def _decide(self, batch_size: int) -> None:
        if self._evidence is not None:
            self._controller.copies = self._evidence.copies
        live = self._control.worker.live_version
        learner = self._control.learner
        if live != self._version:
            if live < self._version:  # a rollback: its successor's acceptance says nothing about it
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

    def _observe(self, step: Step, scheduler_output: Any, sampled: list[list[int]]) -> None:
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
        accepted = sum(max(len(tokens) - 1, 0) for tokens in sampled)
        saved = self._controller.settle(len(counts), step.drafted, verified, accepted)
        self._learner_share.earned(step.seconds, saved, self._controller.could_pay)
        # Only pure decode steps show what K costs. What a burst of the learner's work adds is no property of K, and
        # would be blamed on the draft length that is just being probed.
        if sum(counts.values()) != len(counts) + verified:
            return
        if not (self._learner_rests and step.beside_learner):
            self._controller.costs.observe(len(counts), step.drafted, verified, step.seconds)
        self._learner_share.decoded(len(counts), verified, step.seconds, step.beside_learner)

    def _take_verdicts(self, version: int | None, verdicts: Verdicts) -> None:
        """Verdicts on proposals of one version of the draft, or on copies (None)."""
        self._counting.run(lambda: self._count(version, verdicts))
        if version is not None:
            self._rollback_watch.take(version, verdicts)
            self._controller.wants_verdicts = self._rollback_watch.wants_verdicts

    def _count(self, version: int | None, verdicts: Verdicts) -> None:
        count = sum(verdicts.values())
        tokens, accepted = (sum(pair[i] * n for pair, n in verdicts.items()) for i in (0, 1))
        scheduler = self._control.scheduler
        self._learner_share.accepted(accepted, copied=version is None)
        if version is None:  # copies say nothing about any version
            scheduler.copied_drafts += count
            scheduler.copied_tokens += tokens
            scheduler.copied_accepted += accepted
            return
        if version == self._control.worker.live_version:
            self._controller.acceptance.take(verdicts)
        per_position = [sum(n for (_, a), n in verdicts.items() if a > i) for i in range(self._max_draft_length)]
        scheduler.record(version, count, tokens, accepted, per_position)
