"""The learner's share of a CPU: after each piece of work it sleeps long enough to have taken no more than its share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

LONGEST_SLEEP_S = 5.0


@dataclass
class CpuBudget:
    """Bounds CPU seconds per second.

    Args:
        share: of one CPU, in (0, 1].
        cpu_clock: seconds of CPU this process has used, all threads (``time.process_time``).
        wall_clock: seconds that pass (``time.monotonic``).
    """

    share: float
    cpu_clock: Callable[[], float] = time.process_time
    wall_clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._cpu, self._wall = self.cpu_clock(), self.wall_clock()

    def debt(self) -> float:
        """Seconds to sleep now, so that the CPU taken since the last call stays within the share.

        Waiting counts as rest: at low priority most of the rest happens by itself, where serving needs the CPU.
        """
        cpu, wall = self.cpu_clock(), self.wall_clock()
        used, passed = cpu - self._cpu, wall - self._wall
        pause = min(max(used / self.share - passed, 0.0), LONGEST_SLEEP_S)
        self._cpu, self._wall = cpu, wall + pause
        return pause
