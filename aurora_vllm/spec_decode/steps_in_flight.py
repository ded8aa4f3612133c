"""How long steps take: from when they are scheduled, or the step before them ended, until their results are in."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from aurora_vllm.transport.control import ControlBlock


@dataclass
class Step:
    """A step under way or over.

    ``scheduled``: when, by ``time.perf_counter``; ``beside_learner``: the learner worked when it began or ended;
    ``drafted``: tokens the draft runs for; ``seconds``: its duration, once it is over.
    """

    scheduled: float
    beside_learner: bool
    drafted: int = 0
    seconds: float = 0.0


class StepsInFlight:
    """The steps that are scheduled and not over, two where steps overlap (vLLM's async scheduling).

    Args:
        control: its ``learner`` part is read; how many steps are in flight is written to it.
    """

    def __init__(self, control: ControlBlock) -> None:
        self._control = control
        self._steps: deque[Step] = deque()
        self._ended = 0.0

    def begin(self) -> None:
        """A step is about to be scheduled."""
        self._steps.append(Step(time.perf_counter(), self._learner_works()))
        self._control.scheduler.in_flight = len(self._steps)

    def drafts(self, tokens: int) -> None:
        """In the step that is being scheduled the draft runs for so many tokens."""
        if self._steps:
            self._steps[-1].drafted = tokens

    def end(self) -> Step | None:
        """The oldest step is over. None if none was under way."""
        if not self._steps:
            return None
        now = time.perf_counter()
        step = self._steps.popleft()
        self._control.scheduler.in_flight = len(self._steps)
        step.seconds = now - max(step.scheduled, self._ended)  # a step waits for the one before it
        step.beside_learner |= self._learner_works()
        self._ended = now
        return step

    def _learner_works(self) -> bool:
        """Whether the learner is in a burst of work. The pids are compared, because one that was killed in a burst
        still says so."""
        learner = self._control.learner
        return bool(learner.working and learner.pid and learner.pid == self._control.server.learner_pid)
