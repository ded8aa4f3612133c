"""Detects that speculation loses time at present, whatever is expected of it.

The estimates behind a choice remember hundreds of proposals. Where every request's proposal is verified, right or
wrong, steps lose after the traffic has changed until the estimates have caught up. What steps really gained shows it
within a few. Numbers in, a verdict out.
"""

from __future__ import annotations

import math

MEMORY = 24.0  # steps after which one has lost 1 - 1/e of its weight
FEWEST = 12.0  # steps, by their weights, before anything is decided
SURE = 2.0  # standard errors by which the mean has to lie below -LEAST
LEAST = 0.1  # loss in plain steps; a smaller one costs little until it is noticed anyway


class Balance:
    """Fading mean of the gain of steps with proposals."""

    def __init__(self) -> None:
        self._steps = self._sum = self._squares = 0.0

    def observe(self, gain: float) -> bool:
        """One more step. Returns whether recent steps lost on average, significantly; if so, counting begins anew.

        Args:
            gain: time it saved over plain decoding, in units of a plain step; negative where it lost.
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
