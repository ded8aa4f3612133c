"""Publishes a learner's candidate, or a draft from disk, and brings the learner's own state in line with that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_vllm.errors import AuroraError, notice
from aurora_vllm.learner.from_disk import publish_from_disk
from aurora_vllm.learner.publish import publish
from aurora_vllm.transport.update_request import Answer

if TYPE_CHECKING:
    from aurora_vllm.learner.learner import Learner


class Publisher:
    """The writer of the weight bank, for one learner."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def publish_if_due(self) -> None:
        """Publish the candidate if the evidence, or the setting ``sync``, says so; report the decision."""
        learner = self._learner
        decision = learner.evidence.decide(time.monotonic())
        block, drafts, trainer = learner.control.learner, learner.drafts, learner.curriculum.trainer
        block.candidate_acceptance_length = decision.candidate
        block.incumbent_acceptance_length = decision.incumbent
        block.message = decision.reason
        reason = learner.sync.reason(decision, trainer.steps, learner.requests_seen)
        if not (reason and drafts.candidate_is_ahead):
            return
        version = self.next_version()
        evidence = {"reason": reason, "step": trainer.steps, "lineage": drafts.candidate_lineage(version)}
        try:
            publish(learner.bank, version, drafts.candidate, evidence)
        except ValueError as error:  # the weights are not finite: go back to the last good ones
            block.message = f"not published: {error}"
            drafts.reset_candidate()
            learner.curriculum.go_on()
            trainer.optimizer.state.clear()  # its moments are not finite either, and may be of another vocabulary
            learner.forget_scores("the candidate was not finite")
            return
        drafts.promote(version, learner.evidence.candidate)
        learner.evidence.published(time.monotonic())
        learner.show_shadow()
        self._published(version, reason)

    def publish_from_disk(self, directory: Path) -> Answer:
        """Replace incumbent and candidate by a draft from disk. Learning goes on from it."""
        learner, version = self._learner, self.next_version()
        try:
            draft = publish_from_disk(
                learner.bank, version, directory, learner.drafts.incumbent, lambda: learner.head.embed_tokens
            )
        except AuroraError as error:
            return Answer(0, str(error))
        learner.start_over_from(draft, version, version, "another draft was loaded")
        self._published(version, f"asked for, from {directory}")
        return Answer(version, f"published as version {version}")

    def next_version(self) -> int:
        """A number larger than that of any version there is."""
        learner = self._learner
        return max(learner.drafts.version, learner.bank.newest(), learner.control.worker.live_version) + 1

    def _published(self, version: int, why: str) -> None:
        learner = self._learner
        notice(f"version {version} of the draft is published: {why}")
        learner.sync.published(learner.curriculum.trainer.steps, learner.requests_seen)
        learner.control.learner.published_version = version
        learner.control.learner.publishes += 1
