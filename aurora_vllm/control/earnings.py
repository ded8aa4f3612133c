"""The learner spends what speculation earns.

On a machine that is busy, what the learner takes serving loses. So that a server is not slower than a plain one on the
way to being faster, the learner takes no more than a quarter of what speculation gains in decoding at present (prompts
gain nothing, and are a large part of some traffic), and the least share where it gains nothing yet: a draft that nobody
trains would never earn anything. Numbers in, decisions out.
"""

from __future__ import annotations

from dataclasses import dataclass

SPENT = 0.25  # of the gain; the rest is the users'
MEMORY = 40.0  # steps after which one has lost 1 - 1/e of its weight
EVERY = 10  # steps between two decisions


@dataclass
class Earnings:
    """What part of its share the learner may take.

    Args:
        share: of a CPU, the most it may take.
        least: of a CPU, what it has in any case.
    """

    share: float
    least: float
    gain: float = 1.0  # tokens per second with speculation over those without
    _steps: int = 0

    def observe(self, gain: float) -> bool:
        """What speculation gains at the step being scheduled. Returns whether it is time to read ``factor`` again."""
        self.gain += (gain - self.gain) / MEMORY
        self._steps += 1
        return self._steps % EVERY == 0

    @property
    def factor(self) -> float:
        """On the learner's share, in 0..1."""
        return min(1.0, max(self.least, SPENT * (self.gain - 1.0)) / self.share)

    @property
    def reason(self) -> str:
        """In words."""
        allowed = f"{self.factor * self.share:.3f} of a CPU"
        if self.factor >= 1.0:
            return f"{allowed}, all of its share: speculation gains {self.gain:.2f}x"
        if self.factor * self.share <= self.least:
            return f"{allowed}, its least share: speculation gains {self.gain:.2f}x"
        return f"{allowed}, a quarter of what speculation gains ({self.gain:.2f}x)"
