"""The acceptance table: counts of accepted drafts for each of the last 64 draft versions, and for all of them together.

Only the scheduler writes it. A row has several words, so it has a sequence word, which is odd while the row is being
written; a reader that finds it odd, or changed, reads again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aurora_vllm.transport.block import POSITIONS
from aurora_vllm.transport.fence import fence

ROWS = 64
_WORDS = 16  # int64 words of a row; two cache lines
TABLE_BYTES = (ROWS + 1) * _WORDS * 8
_TOTAL = ROWS * _WORDS  # the row after them is that of all versions

# Words of a row. TOUCHED is the number of the row's newest record. The row with the smallest one is reused; that of a
# version that came back by a rollback is not, because it has new records.
_SEQUENCE, _TOUCHED, _VERSION, _NUM_DRAFTS, _DRAFT_TOKENS, _ACCEPTED, _POSITION = 0, 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class VersionAcceptance:
    """Counts of one draft version, as vLLM counts them (SpecDecodingStats)."""

    version: int
    num_drafts: int  # verifications: steps of single requests that had drafts
    num_draft_tokens: int
    num_accepted: int
    accepted_per_position: tuple[int, ...]  # [8]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per verification, bonus token included: 1 + accepted / drafts; 1 before the first."""
        return 1 + self.num_accepted / self.num_drafts if self.num_drafts else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the mean acceptance length."""
        plain = asdict(self) | {"mean_acceptance_length": self.mean_acceptance_length}
        return plain | {"accepted_per_position": list(self.accepted_per_position)}


class AcceptanceTable:
    """64 rows over `buf` (uint8 [TABLE_BYTES])."""

    def __init__(self, buf: memoryview) -> None:
        self._words = buf.cast("q")
        self._row_of = {
            self._words[at + _VERSION]: at for at in range(0, ROWS * _WORDS, _WORDS) if self._words[at + _TOUCHED]
        }
        self._touched = max((self._words[at + _TOUCHED] for at in self._row_of.values()), default=0)

    def record(
        self, version: int, num_drafts: int, draft_tokens: int, accepted: int, accepted_per_position: Sequence[int]
    ) -> None:
        """Add counts to a version's row; a new version takes the row that has gone longest without a record.

        Args:
            version: of the draft weights.
            num_drafts: verifications.
            draft_tokens: tokens proposed in them.
            accepted: tokens accepted.
            accepted_per_position: the same, at positions 0, 1, …; those past the eighth are ignored.
        """
        words, at = self._words, self._row_of.get(version)
        fresh = at is None
        if at is None:
            at = min(range(0, ROWS * _WORDS, _WORDS), key=lambda row: words[row + _TOUCHED])
            self._row_of = {v: row for v, row in self._row_of.items() if row != at} | {version: at}
        self._touched += 1
        counts = num_drafts, draft_tokens, accepted, *map(int, accepted_per_position[:POSITIONS])
        self._add(at, counts, version if fresh else None)
        self._add(_TOTAL, counts, None)

    def _add(self, at: int, counts: Sequence[int], begins: int | None) -> None:
        """Add to a row; where ``begins`` is given, the row starts anew for this version."""
        words = self._words
        sequence = words[at] | 1  # a writer killed midway left it odd
        words[at] = sequence
        fence()
        if begins is not None:
            for word in range(_VERSION, _WORDS):
                words[at + word] = 0
            words[at + _VERSION] = begins
        words[at + _TOUCHED] = self._touched
        for word, count in enumerate(counts, start=_NUM_DRAFTS):
            words[at + word] += count
        fence()
        words[at] = sequence + 1

    def total(self) -> VersionAcceptance:
        """Counts of all versions, those without a row included; their ``version`` is 0."""
        return self._read(_TOTAL) or VersionAcceptance(0, 0, 0, 0, (0,) * POSITIONS)

    def rows(self) -> list[VersionAcceptance]:
        """Rows in ascending order of version. One whose writer died while writing it is left out."""
        found = filter(None, map(self._read, range(0, ROWS * _WORDS, _WORDS)))
        return sorted(found, key=lambda row: row.version)

    def _read(self, at: int) -> VersionAcceptance | None:
        for attempt in range(20):
            if attempt:
                time.sleep(0.0005)  # the writer may have lost the CPU meanwhile
            sequence = self._words[at]
            fence()
            row = self._words[at : at + _WORDS].tolist()
            fence()
            if sequence % 2 == 0 and self._words[at] == sequence:
                if not row[_TOUCHED]:
                    return None
                version, drafts, tokens, accepted = row[_VERSION:_POSITION]
                return VersionAcceptance(
                    version, drafts, tokens, accepted, tuple(row[_POSITION : _POSITION + POSITIONS])
                )
        return None
