"""Watches a new version on probation. The scheduler sees the verdicts; the worker has both versions, and is asked to
roll back. The test itself is :mod:`aurora_vllm.control.rollout`.
"""

from __future__ import annotations

import functools
import logging
import random

from aurora_vllm.control.acceptance import Verdicts
from aurora_vllm.control.rollout import Rollout
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import ControlBlock

logger = logging.getLogger("vllm.aurora")

ACCOUNT_EVERY = 20  # verified drafts between two reports on a probation
MOST_AT_ONCE = 64  # verdicts; takes about 1 ms


class RollbackWatch:
    """Feeds verdicts to the test, and has the worker roll back the versions that it rejects.

    Args:
        control: its ``scheduler`` part is written.
        max_draft_length: the largest K.
        confidence: see :class:`Rollout`.
    """

    def __init__(self, control: ControlBlock, max_draft_length: int, confidence: float) -> None:
        self._control = control
        self._rollout = Rollout(max_draft_length, confidence)
        self._breaker = CircuitBreaker("watching a new version")
        self._accounted: tuple[int, str] = (0, "")
        self._random = random.Random(0)

    @property
    def wants_verdicts(self) -> bool:
        """Whether the version looks worse, so that drafting should go on until that is decided."""
        return self._rollout.looks_worse

    def take(self, version: int, verdicts: Verdicts) -> None:
        """Verdicts on one version's drafts, in an order that is not known. Of many it takes a random sample: the test
        looks at one after the other, and a few hundred decide it."""
        each = [verdict for verdict, count in verdicts.items() for _ in range(count)]
        if len(each) > 1:
            each = self._random.sample(each, min(len(each), MOST_AT_ONCE))
        for num_drafts, num_accepted in each:
            self._breaker.run(functools.partial(self._judge, version, num_drafts, num_accepted))

    def _judge(self, version: int, num_drafts: int, num_accepted: int) -> None:
        rollout, scheduler = self._rollout, self._control.scheduler
        rollout.observe(version, self._control.worker.previous_version, num_drafts, num_accepted)
        standing = (rollout.version, rollout.decision)
        if standing == self._accounted and (rollout.decision != "undecided" or rollout.drafts % ACCOUNT_EVERY):
            return
        self._accounted = standing
        scheduler.probation_version, scheduler.probation = rollout.version, rollout.reason
        scheduler.probation_drafts, scheduler.probation_evidence = rollout.drafts, rollout.evidence
        if rollout.decision == "keep" and rollout.drafts:  # without drafts it was never on probation
            logger.info("aurora: %s", rollout.reason)
        if rollout.decision == "rollback":
            scheduler.roll_back_version = rollout.version  # last, so that the reason is there when it is seen
