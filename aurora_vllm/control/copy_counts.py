"""Counts of copies where they are made on the device: the layout of the array, and how the scheduler's side reads it.

There the host learns of a verdict a step late and never sees a proposal. So the device counts, the worker passes the
sums on every few steps, and the scheduler takes in what has been added since. Numbers in, numbers out: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from aurora_vllm.control.acceptance import Verdicts
from aurora_vllm.control.copy_kinds import CopyKinds
from aurora_vllm.control.copying import Copies

ORDERS = (1, 2, 3, 8)  # tokens of context that a copy may rest on
KINDS = CopyKinds(ORDERS)
NUM_KINDS = KINDS.count
COPIED, ORIGINS = 2, 3  # who proposed: 0 and 1 are the newest two versions of the draft, which take turns


@dataclass(frozen=True)
class CountsLayout:
    """Offsets of the counts, for proposals of at most ``positions`` tokens. All are int64 and only ever grow.

    ========== ============================================ ==================================================
    seen       [NUM_KINDS]                                  proposals for which there was such a copy
    compared   [NUM_KINDS, 4]                               2 * (copy's first token right) + (draft's right)
    simulated  [NUM_KINDS, positions + 1]                   copies by how many of their tokens were right
    verdicts   [ORIGINS, positions + 1, positions + 1]      by tokens verified, then tokens accepted
    versions   [2]                                          not counts: which versions origins 0 and 1 are
    ========== ============================================ ==================================================
    """

    positions: int

    @property
    def seen(self) -> int:
        return 0

    @property
    def compared(self) -> int:
        return NUM_KINDS

    @property
    def simulated(self) -> int:
        return self.compared + 4 * NUM_KINDS

    @property
    def verdicts(self) -> int:
        return self.simulated + NUM_KINDS * (self.positions + 1)

    @property
    def versions(self) -> int:
        return self.verdicts + ORIGINS * (self.positions + 1) ** 2

    @property
    def size(self) -> int:
        return self.versions + 2


class TakeVerdicts(Protocol):
    """Receives verdicts on what a version of the draft proposed, or (None) on copies."""

    def __call__(self, version: int | None, verdicts: Verdicts) -> None: ...


class CountsReader:
    """Turns sums into what was added since the last call: the verdicts of a few steps, in unknown order.

    They are passed on as totals, so that nothing depends on an order: with large batches they are thousands, and in
    ascending order all failures would come first.

    Args:
        positions: longest proposal.
    """

    def __init__(self, positions: int) -> None:
        self._layout = CountsLayout(positions)
        self._before = np.zeros(self._layout.versions, dtype=np.int64)

    def read(self, sums: Sequence[int], copies: Copies, take_verdicts: TakeVerdicts) -> None:
        """Take in what is new.

        Args:
            sums: int [layout.size], or longer.
            copies: receives what was seen, compared and simulated.
            take_verdicts: called once for each version that has verdicts, and once for copies.
        """
        layout, width = self._layout, self._layout.positions + 1
        now = np.array(sums[: layout.size])
        added, self._before = now[: layout.versions] - self._before, now[: layout.versions]
        outcomes = added[layout.compared : layout.simulated].reshape(NUM_KINDS, 2, 2)  # copy right, draft right
        gains = zip((outcomes[:, 1, 0] - outcomes[:, 0, 1]).tolist(), outcomes.sum((1, 2)).tolist(), strict=True)
        right = added[layout.simulated : layout.verdicts].reshape(NUM_KINDS, width)
        copies.take(
            added[: layout.compared].tolist(),
            {kind: (gain, count) for kind, (gain, count) in enumerate(gains) if count},
            {kind: _verdicts(right[kind], layout.positions) for kind in np.flatnonzero(right.sum(1)).tolist()},
        )
        verdicts = added[layout.verdicts :].reshape(ORIGINS, width, width)
        for version, table in zip((*now[layout.versions :].tolist(), None), verdicts, strict=True):
            if table.any():
                take_verdicts(version, _verdicts(table))


def _verdicts(counts: np.ndarray, verified: int | None = None) -> Verdicts:
    """counts: int64 [tokens verified, tokens accepted], or [tokens accepted] where ``verified`` is the same for all."""
    found = ((tuple(at), int(counts[tuple(at)])) for at in np.argwhere(counts).tolist())
    return {(at[0], at[1]) if verified is None else (verified, at[0]): count for at, count in found}
