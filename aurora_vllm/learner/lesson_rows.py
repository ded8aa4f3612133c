"""Rows of a lesson: which trajectories it learns from, in which pieces, and windows over their rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aurora_vllm.learner.trajectory import Trajectory

HELD_OUT = 0.2  # share of the rows, the newest, on which induction heads are tested
PIECE_ROWS = 2048  # rows of one piece of work
SAMPLE_ROWS = 8192  # the newest rows, from which codes are found


def hold_out(trajectories: Sequence[Trajectory]) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The older ones, and the newest with about a share HELD_OUT of all rows. A single one counts as older."""
    return _newest(trajectories, HELD_OUT * sum(len(one.token_ids) for one in trajectories), spare=1)


def newest(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """The newest ones, of about SAMPLE_ROWS rows together; at least one."""
    return _newest(trajectories, SAMPLE_ROWS)[1]


def _newest(
    trajectories: Sequence[Trajectory], rows: float, spare: int = 0
) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The older ones, at least ``spare``, and the fewest newest ones that have this many rows."""
    first = len(trajectories)
    while first > spare and rows > 0:
        first -= 1
        rows -= len(trajectories[first].token_ids)
    return trajectories[:first], trajectories[first:]


def pieces_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Consecutive ones together, about PIECE_ROWS rows each."""
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
    """[T - 1, H] -> for k = 0 .. steps - 1, the rows k after each of the first T - steps rows. [T - steps, H] each"""
    count = len(x) + 1 - steps
    return [x[k : k + count] for k in range(steps)]
