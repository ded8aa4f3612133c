"""The replay buffer: the newest trajectories, within a byte budget, in memory only."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aurora_vllm.learner.trajectory import Trajectory

RECENT_AT_LEAST = 8  # trajectories that always count as recent


@dataclass(eq=False)
class _Held:
    trajectory: Trajectory
    due: float = 0.0  # how often it is to be sampled
    uses: int = 0

    @property
    def owed(self) -> float:
        """Rows still to be sampled, summed over passes."""
        return max(0.0, self.due - self.uses) * len(self.trajectory.token_ids)


class Replay:
    """A bounded window over the traffic.

    Trajectories that were never sampled come first, newest before older: fresh traffic teaches most, and if the learner
    cannot keep up, the old has to wait. After that, some of the samples are drawn from the recent past and the others
    from the whole window, so that earlier traffic is not forgotten.

    Args:
        max_bytes: of the tensors of all trajectories; the oldest are evicted first.
        recent: share of repeated samples that are drawn from the newest quarter of the window.
        seed: of the draws.

    Attributes:
        nbytes, tokens: of the present trajectories; tokens are rows.
        evicted: number of trajectories evicted so far.
        missed: rows that left, for whatever reason, before they were sampled as often as due; a row counts once for
            each missed pass.
    """

    def __init__(self, max_bytes: int, recent: float = 0.5, seed: int = 0) -> None:
        self._max_bytes = max_bytes
        self._recent = recent
        self._random = random.Random(seed)
        self._window: deque[_Held] = deque()  # oldest first
        self.nbytes = 0
        self.tokens = 0
        self.evicted = 0
        self.missed = 0.0

    def __len__(self) -> int:
        return len(self._window)

    def mean_uses(self) -> float:
        """How often the present trajectories were sampled, on average."""
        return sum(held.uses for held in self._window) / len(self._window) if self._window else 0.0

    def add(self, trajectory: Trajectory, due: float = 0.0) -> bool:
        """Add a trajectory. If it alone exceeds the budget, returns False and changes nothing.

        Args:
            due: how often it should be sampled; used only to count ``missed``.
        """
        if trajectory.nbytes > self._max_bytes:
            return False
        self._window.append(_Held(trajectory, due))
        self._account(trajectory, 1)
        while self.nbytes > self._max_bytes:
            self._leaves(self._window.popleft())
            self.evicted += 1
        return True

    def make_due(self, tokens: int, due: float) -> float:
        """Make the newest trajectories, of about ``tokens`` rows, due if they are not. Returns the rows owed for it."""
        owed = 0.0
        for held in reversed(self._window):
            if tokens <= 0:
                break
            tokens -= len(held.trajectory.token_ids)
            if not held.due:
                held.due = due
                owed += held.owed
        return owed

    def sample(self, tokens: int) -> list[Trajectory]:
        """Distinct trajectories of about ``tokens`` rows together: at least one, and more as long as they fit.

        Returns an empty list from an empty replay.
        """
        chosen: list[_Held] = []
        room = tokens
        while (held := self._draw(chosen)) is not None:
            if chosen and len(held.trajectory.token_ids) > room:
                break
            chosen.append(held)
            room -= len(held.trajectory.token_ids)
        for held in chosen:
            held.uses += 1
        return [held.trajectory for held in chosen]

    def newest(self, tokens: int) -> list[Trajectory]:
        """The newest trajectories of at most ``tokens`` rows together, oldest first. Not counted as a use."""
        chosen: list[Trajectory] = []
        for held in reversed(self._window):
            tokens -= len(held.trajectory.token_ids)
            if tokens < 0:
                break
            chosen.append(held.trajectory)
        return chosen[::-1]

    def remove(self, trajectories: Iterable[Trajectory]) -> None:
        """Remove trajectories that cannot be learned from."""
        gone = {id(one) for one in trajectories}
        for held in self._window:
            if id(held.trajectory) in gone:
                self._leaves(held)
        self._window = deque(held for held in self._window if id(held.trajectory) not in gone)

    def _leaves(self, held: _Held) -> None:
        self._account(held.trajectory, -1)
        self.missed += held.owed

    def _account(self, trajectory: Trajectory, sign: int) -> None:
        self.nbytes += sign * trajectory.nbytes
        self.tokens += sign * len(trajectory.token_ids)

    def _draw(self, taken: list[_Held]) -> _Held | None:
        free = [held for held in self._window if held not in taken]
        if not free:
            return None
        for held in reversed(free):
            if held.uses == 0:
                return held
        if self._random.random() < self._recent:
            recent = max(RECENT_AT_LEAST, len(self._window) // 4)
            return self._random.choice(free[-recent:])
        return self._random.choice(free)
