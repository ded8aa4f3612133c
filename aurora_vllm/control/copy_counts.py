"""What the worker counts of copies where it replaces proposals on the device: a layout of one array, and its reading.

The host there learns of a verdict a step late and never sees a proposal, so the device counts, the worker passes the
sums on every few steps, and the scheduler takes in what has been added since. Numbers in, numbers out: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from aurora_vllm.control.copying import Copies

ORDERS = (2, 3, 5, 8)  # tokens of context that a copy may rest on
SOURCES = 2  # the request's own text, and the answers of others
KINDS = 1 + 2 * SOURCES * len(ORDERS)  # 0: no copy; by order, then by source, then greedy and sampled requests
DRAFTED_EVEN, DRAFTED_ODD, COPIED = 0, 1, 2  # who proposed; versions of the draft take turns
ORIGINS = 3


@dataclass(frozen=True)
class CountsLayout:
    """Where which count stands, for proposals of at most ``positions`` tokens. All are int64 and only ever grow.

    ========== ============================================ ==================================================
    seen       [KINDS]                                      proposals for which there was such a copy
    compared   [KINDS, 4]                                   2 * (copy's first token right) + (draft's right)
    simulated  [KINDS, positions + 1]                       copies by how many of their tokens came true
    verdicts   [ORIGINS, positions + 1, positions + 1]      by tokens verified, then tokens accepted
    versions   [2]                                          no counts: which versions DRAFTED_EVEN and _ODD are
    ========== ============================================ ==================================================
    """

    positions: int

    @property
    def seen(self) -> int:
        return 0

    @property
    def compared(self) -> int:
        return KINDS

    @property
    def simulated(self) -> int:
        return self.compared + 4 * KINDS

    @property
    def verdicts(self) -> int:
        return self.simulated + KINDS * (self.positions + 1)

    @property
    def versions(self) -> int:
        return self.verdicts + ORIGINS * (self.positions + 1) ** 2

    @property
    def size(self) -> int:
        return self.versions + 2


class Verdict(Protocol):
    """Takes in that ``count`` times, of ``num_drafts`` tokens proposed by a version of the draft, or copied (None),
    ``num_accepted`` were accepted."""

    def __call__(self, version: int | None, num_drafts: int, num_accepted: int, count: int) -> None: ...


class CountsReader:
    """Turns sums into what was added since the last look.

    Args:
        positions: of the proposals.
    """

    def __init__(self, positions: int) -> None:
        self._layout = CountsLayout(positions)
        self._before = [0] * self._layout.versions

    def read(self, sums: Sequence[int], copies: Copies, verdict: Verdict) -> None:
        """Take in the work of a few steps; in what order it was done is not known.

        Args:
            sums: int [layout.size], or more.
            copies: what is known of copies; fed with what was seen, compared and simulated.
            verdict: called for each outcome.
        """
        layout, width = self._layout, self._layout.positions + 1
        versions = (*sums[layout.versions : layout.size], None)
        for at, (now, before) in enumerate(zip(sums, self._before, strict=False)):
            count = now - before
            if not count:
                continue
            if at < layout.compared:
                copies.seen(at, count)
            elif at < layout.simulated:
                kind, right = divmod(at - layout.compared, 4)
                copies.compare(kind, right >= 2, right % 2 == 1, count)
            elif at < layout.verdicts:
                kind, right = divmod(at - layout.simulated, width)
                copies.simulate(kind, layout.positions, right, count)
            else:
                rest, accepted = divmod(at - layout.verdicts, width)
                origin, verified = divmod(rest, width)
                verdict(versions[origin], verified, accepted, count)
        self._before = list(sums[: layout.versions])
