"""The learner's share follows what speculation saves.

On a busy machine, serving loses what the learner takes. So that a server is not slower than a plain one on the way to
being faster, the learner's share is bounded by a part of the time that speculation saves at present. What a step saved
is known when it is over (:meth:`DraftLengthController.settle`), from accepted tokens rather than expected ones. Where
nothing is saved yet there is a minimum share, because an untrained draft would never save anything. Numbers in,
decisions out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SPENT = 0.25  # of what is saved: a step beside the learner loses more than the learner takes, and users keep the rest
MEMORY_S = 10.0  # seconds after which a step has lost 1 - 1/e of its weight
EVERY_S = 1.0  # seconds between two decisions


@dataclass
class Earnings:
    """The part of its share that the learner may take.

    Args:
        share: its largest share of a CPU.
        least: its minimum share of a CPU.
    """

    share: float
    least: float
    saved: float = 0.0  # seconds for each second of the engine's steps
    _since: float = 0.0

    def observe(self, seconds: float, saved: float) -> bool:
        """One step. Returns whether it is time to read ``factor`` again.

        Args:
            seconds: duration of the step, prompts included.
            saved: seconds that plain decoding would have taken longer; negative where speculation lost.
        """
        self.saved = self.saved * math.exp(-seconds / MEMORY_S) + saved / MEMORY_S
        self._since += seconds
        due = self._since >= EVERY_S
        self._since = 0.0 if due else self._since
        return due

    @property
    def factor(self) -> float:
        """Factor on the learner's share, in 0..1."""
        return min(1.0, max(self.least, SPENT * self.saved) / self.share)

    @property
    def reason(self) -> str:
        """The factor in words."""
        allowed = f"{self.factor * self.share:.3f} of a CPU"
        earned = f"speculation {'saves' if self.saved >= 0 else 'loses'} {abs(self.saved):.2f} s a second"
        if self.factor >= 1.0:
            return f"{allowed}, all of its share: {earned}"
        if self.factor * self.share <= self.least:
            return f"{allowed}, its least share: {earned}"
        return f"{allowed}, a quarter of what is saved: {earned}"
