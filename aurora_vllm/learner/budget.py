"""Keeps the learner to its share of a CPU, or of a GPU, by resting after each piece of work.

It sleeps for a short while at a time, so that it keeps responding to the server. If it owes more rest it sleeps again,
and in between only empties the ring. While nothing is served there is no limit, and no rest is owed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LONGEST_SLEEP_S = 2.0


class DeviceClock:
    """Seconds of GPU time taken by this process, measured on the host: from the start of each piece of work until the
    GPU has done it.

    An upper bound, because it includes the host's part of the work, except for what is marked by :meth:`on_host`.
    Without MPS a GPU runs one process at a time, so how long serving waits is bounded by the length of these pieces;
    stream priorities have no effect between processes.

    Args:
        settle: returns when all work so far is done.
        wall_clock: the time, in seconds.
    """

    def __init__(self, settle: Callable[[], None], wall_clock: Callable[[], float] = time.monotonic) -> None:
        self._settle, self._wall_clock = settle, wall_clock
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def run(self, work: Callable[[], bool]) -> bool:
        """Do a piece of work, and count its time."""
        began = self._wall_clock()
        done = work()
        self._settle()
        self._seconds += self._wall_clock() - began
        return done

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """A context for a part of such work that needs no GPU: its time is not counted."""
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
        cpu_clock: CPU seconds of this process, all threads (``time.process_time``); or a :class:`DeviceClock`.
        wall_clock: the time, in seconds (``time.monotonic``).
        longest_sleep_s: the longest sleep at a time.
    """

    share: float
    cpu_clock: Callable[[], float] = time.process_time
    wall_clock: Callable[[], float] = time.monotonic
    longest_sleep_s: float = LONGEST_SLEEP_S

    def __post_init__(self) -> None:
        self._cpu, self._wall = self.cpu_clock(), self.wall_clock()
        self._engine_steps = 0
        self._owed = 0.0
        self._was_stopped = False

    def continues(self) -> None:
        """This process was stopped by a signal until now. The time since the last ``debt`` is no rest then, nor time
        without traffic: a benchmark that stops the learner while others are measured would otherwise let it work more
        than its share in between."""
        self._was_stopped = True

    def debt(self, engine_steps: int, factor: float = 1.0, in_flight: int = 0) -> float:
        """Seconds to sleep now, so that the CPU time taken so far stays within the share.

        Any time that passes counts as rest, also that in which this low-priority process waited for a CPU.

        Args:
            engine_steps: steps of the server so far. If there were none since the last call, and none is in flight,
                nothing is being served.
            factor: on the share while something is served; less than 1 where the learner slows serving too much.
            in_flight: steps under way; one with a long prompt takes seconds.
        """
        cpu, wall = self.cpu_clock(), self.wall_clock()
        used, passed = cpu - self._cpu, wall - self._wall
        was_stopped, self._was_stopped = self._was_stopped, False
        if was_stopped:
            passed = 0.0
        if engine_steps == self._engine_steps and not in_flight and not was_stopped:
            self._owed = 0.0
        else:
            self._owed = max(self._owed + used / (self.share * factor) - passed, 0.0)
        self._cpu, self._wall, self._engine_steps = cpu, wall, engine_steps
        return min(self._owed, self.longest_sleep_s)

    @property
    def owes_more(self) -> bool:
        """Whether more rest is owed than the sleep just returned, so that the next turn must not do any work."""
        return self._owed > self.longest_sleep_s
