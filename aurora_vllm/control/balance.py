"""Has speculation been losing, whatever is expected of it?

What decides on proposals remembers hundreds of them, and where every request's proposal is verified, right or wrong,
each of those costs after the traffic has changed. What steps were really worth shows it in a few. Numbers in, a word
out.
"""

from __future__ import annotations

import math

MEMORY = 24.0  # steps after which one has lost 1 - 1/e of its weight
FEWEST = 12.0  # steps, by their weights, before a word is said
SURE = 2.0  # standard errors that the mean has to lie below that
LEAST = 0.1  # plain steps that one has to lose: what loses less costs little until it is noticed anyway


class Balance:
    """Steps with proposals, the older ones for less."""

    def __init__(self) -> None:
        self._steps = self._sum = self._squares = 0.0

    def observe(self, gain: float) -> bool:
        """One more step. True where those of late lost on average, surely enough; it begins anew then.

        Args:
            gain: what it saved over plain decoding, in plain steps; negative where it lost.
        """
        keep = 1.0 - 1.0 / MEMORY
        self._steps = self._steps * keep + 1.0
        self._sum = self._sum * keep + gain
        self._squares = self._squares * keep + gain * gain
        mean = self._sum / self._steps
        error = math.sqrt(max(self._squares / self._steps - mean * mean, 0.0) / self._steps)
        if self._steps < FEWEST or mean + SURE * error >= -LEAST:
            return False
        self._steps = self._sum = self._squares = 0.0
        return True
