"""The learner's share of a CPU, or of a GPU: after each piece of work it rests long enough to have taken no more.

It sleeps for a short while at a time, so that it keeps hearing the server. Where it owes more rest it sleeps again, and
in between empties the ring but does no work. While nothing is served its share is the whole, and nothing is owed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LONGEST_SLEEP_S = 2.0


class DeviceClock:
    """Seconds of a GPU that this process has taken, as the host sees it: from the beginning of each piece of work until
    the GPU has done it.

    An upper bound: the host's own part of the work is in it, but for what is said to need no GPU at all. Without MPS a
    GPU runs one process at a time, so it is the slices between two rests that bound what serving has to wait for; a
    stream's priority says nothing across processes.

    Args:
        settle: returns when all work so far is done.
        wall_clock: seconds that pass.
    """

    def __init__(self, settle: Callable[[], None], wall_clock: Callable[[], float] = time.monotonic) -> None:
        self._settle, self._wall_clock = settle, wall_clock
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def run(self, work: Callable[[], bool]) -> bool:
        """Do a piece of work, and count it."""
        began = self._wall_clock()
        done = work()
        self._settle()
        self._seconds += self._wall_clock() - began
        return done

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Around a part of such work that needs no GPU: it is not counted."""
        began = self._wall_clock()
        try:
            yield
        finally:
            self._seconds -= self._wall_clock() - began


@dataclass
class CpuBudget:
    """Bounds CPU seconds per second.

    Args:
        share: of one CPU while something is served, in (0, 1].
        cpu_clock: seconds of CPU this process has used, all threads (``time.process_time``); or a :class:`DeviceClock`.
        wall_clock: seconds that pass (``time.monotonic``).
        longest_sleep_s: without a look around.
    """

    share: float
    cpu_clock: Callable[[], float] = time.process_time
    wall_clock: Callable[[], float] = time.monotonic
    longest_sleep_s: float = LONGEST_SLEEP_S

    def __post_init__(self) -> None:
        self._cpu, self._wall = self.cpu_clock(), self.wall_clock()
        self._engine_steps = 0
        self._owed = 0.0

    def debt(self, engine_steps: int, factor: float = 1.0, in_flight: int = 0) -> float:
        """Seconds to sleep now, so that the CPU taken so far stays within the share.

        Time that passes counts as rest: at low priority some of it comes by itself, where serving needs the CPU.

        Args:
            engine_steps: of the server, ever; where it is what it was at the last call, and none is in flight, nothing
                is being served.
            factor: on the share while something is served: less than 1 where the learner slows serving too much.
            in_flight: steps under way. One with a long prompt takes seconds.
        """
        cpu, wall = self.cpu_clock(), self.wall_clock()
        used, passed = cpu - self._cpu, wall - self._wall
        if engine_steps == self._engine_steps and not in_flight:
            self._owed = 0.0
        else:
            self._owed = max(self._owed + used / (self.share * factor) - passed, 0.0)
        self._cpu, self._wall, self._engine_steps = cpu, wall, engine_steps
        return min(self._owed, self.longest_sleep_s)

    @property
    def owes_more(self) -> bool:
        """Whether a sleep as long as was just said is not enough: work has to wait for the next."""
        return self._owed > self.longest_sleep_s
