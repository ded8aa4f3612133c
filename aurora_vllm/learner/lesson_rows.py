"""Rows of a lesson: which trajectories it learns from, in which pieces, and what stands how far behind what."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aurora_vllm.learner.trajectory import Trajectory

HELD_OUT = 0.2  # of the rows, the newest: what decides about induction heads
PIECE_ROWS = 2048  # rows of one piece of work
SAMPLE_ROWS = 8192  # the newest ones, to measure the traffic on


def hold_out(trajectories: Sequence[Trajectory]) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The older ones, and the newest of about HELD_OUT of the rows together. One alone is an older one."""
    return _newest(trajectories, HELD_OUT * sum(len(one.token_ids) for one in trajectories), spare=1)


def newest(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """Those of about SAMPLE_ROWS rows together, at least one."""
    return _newest(trajectories, SAMPLE_ROWS)[1]


def _newest(
    trajectories: Sequence[Trajectory], rows: float, spare: int = 0
) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The older ones, ``spare`` at least, and the fewest of the newest that have so many rows."""
    first = len(trajectories)
    while first > spare and rows > 0:
        first -= 1
        rows -= len(trajectories[first].token_ids)
    return trajectories[:first], trajectories[first:]


def pieces_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbours together, about PIECE_ROWS rows each."""
    pieces: list[list[Trajectory]] = []
    rows = 0
    for one in trajectories:
        if not pieces or rows + len(one.token_ids) > PIECE_ROWS:
            pieces.append([])
            rows = 0
        pieces[-1].append(one)
        rows += len(one.token_ids)
    return pieces


def windows(x: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """[T - 1, H] -> what stands 0, 1, ... steps - 1 rows behind each of the first T - steps rows."""
    count = len(x) + 1 - steps
    return [x[k : k + count] for k in range(steps)]
