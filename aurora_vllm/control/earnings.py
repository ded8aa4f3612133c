"""The learner spends what speculation earns.

On a machine that is busy, what the learner takes serving loses. So that a server is not slower than a plain one on the
way to being faster, the learner's share is bounded by a part of the time that speculation saves at present. What a step
saved is known when it is over (:meth:`DraftLengthController.settle`): from tokens that were accepted, not from hopes.
There is a least share where nothing is saved yet: a draft that nobody trains would never earn anything. Numbers in,
decisions out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SPENT = 0.25  # of what is saved. A step beside the learner loses more than the learner takes; the rest is the users'
MEMORY_S = 10.0  # after which a step has lost 1 - 1/e of its weight
EVERY_S = 1.0  # between two decisions


@dataclass
class Earnings:
    """What part of its share the learner may take.

    Args:
        share: of a CPU, the most it may take.
        least: of a CPU, what it has in any case.
    """

    share: float
    least: float
    saved: float = 0.0  # seconds for each second of the engine's steps
    _since: float = 0.0

    def observe(self, seconds: float, saved: float) -> bool:
        """A step. Returns whether it is time to read ``factor`` again.

        Args:
            seconds: it took, prompts in it included.
            saved: seconds that plain decoding would have taken longer; negative where speculation lost.
        """
        self.saved = self.saved * math.exp(-seconds / MEMORY_S) + saved / MEMORY_S
        self._since += seconds
        due = self._since >= EVERY_S
        self._since = 0.0 if due else self._since
        return due

    @property
    def factor(self) -> float:
        """On the learner's share, in 0..1."""
        return min(1.0, max(self.least, SPENT * self.saved) / self.share)

    @property
    def reason(self) -> str:
        """In words."""
        allowed = f"{self.factor * self.share:.3f} of a CPU"
        earned = f"speculation {'saves' if self.saved >= 0 else 'loses'} {abs(self.saved):.2f} s a second"
        if self.factor >= 1.0:
            return f"{allowed}, all of its share: {earned}"
        if self.factor * self.share <= self.least:
            return f"{allowed}, its least share: {earned}"
        return f"{allowed}, a quarter of what is saved: {earned}"
