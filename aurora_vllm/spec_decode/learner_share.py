"""The learner's present share, written into the control block.

It follows what speculation saves (:mod:`aurora_vllm.control.earnings`), unless K is fixed, and what learning adds to a
step (:mod:`aurora_vllm.control.guard`), if a bound on that is set.
"""

from __future__ import annotations

from aurora_vllm.config import AuroraConfig
from aurora_vllm.control.earnings import Earnings
from aurora_vllm.control.guard import LearnerGuard
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import ControlBlock


class LearnerShare:
    """Combines both.

    Args:
        config: the settings.
        control: its ``scheduler`` part is written; of its ``learner`` part, the CPU time used so far is read.
    """

    def __init__(self, config: AuroraConfig, control: ControlBlock) -> None:
        self._scheduler, self._learner = control.scheduler, control.learner
        shares = config.learner_cpu_share, config.learner_least_share, config.learner_resting_share
        self._earnings = Earnings(*shares) if config.speculate == "auto" else None
        self._guard = LearnerGuard(config.learner_slowdown) if config.learner_slowdown else None
        self._breaker = CircuitBreaker("watching what the learner costs")
        self._scheduler.learner_guard = self._guard.reason if self._guard else "off by the settings"
        self._show()

    def earned(self, seconds: float, saved: float, could_pay: bool) -> None:
        """A step took ``seconds``, and plain decoding would have taken ``saved`` seconds longer.

        Args:
            could_pay: whether drafting would pay if the draft were a good one.
        """
        if self._earnings is not None and self._earnings.observe(seconds, saved):
            self._earnings.used_s, self._earnings.could_pay = self._learner.cpu_seconds, could_pay
            self._show()

    def accepted(self, tokens: int, copied: bool) -> None:
        """Accepted tokens, which the draft proposed or which were copied; before ``earned`` for their step."""
        if self._earnings is not None:
            self._earnings.accepted(tokens, copied)

    def decoded(self, batch_size: int, verified: int, seconds: float, beside_learner: bool) -> None:
        """A pure decode step, in which ``verified`` proposed tokens were verified."""
        if (guard := self._guard) is not None:
            self._breaker.run(lambda: self._judge(guard, batch_size, verified, seconds, beside_learner))

    def _judge(self, guard: LearnerGuard, batch_size: int, verified: int, seconds: float, beside_learner: bool) -> None:
        if guard.observe(batch_size, verified, seconds, beside_learner):
            self._scheduler.learner_slowdown, self._scheduler.learner_guard = guard.slowdown, guard.reason
            self._show()

    def _show(self) -> None:
        earned = self._earnings.factor if self._earnings else 1.0
        self._scheduler.learner_share = earned * (self._guard.share if self._guard else 1.0)
        self._scheduler.learner_earnings = self._earnings.reason if self._earnings else "all of its share: K is fixed"
