"""Kinds of copies. Those of one kind are about equally reliable, and are judged together."""

from __future__ import annotations

from dataclasses import dataclass

NO_COPY = 0  # the kind where there is nothing to copy


@dataclass(frozen=True)
class CopyKinds:
    """A kind is a source (the request itself or others), a number of matching tokens before the copy, and whether the
    request is sampled: sampled requests accept copies less often than greedy ones, so they are counted apart.

    Args:
        matches: the numbers of matching tokens that are distinguished.
    """

    matches: tuple[int, ...]

    @property
    def count(self) -> int:
        """Of all kinds, :data:`NO_COPY` included; their numbers are 0 to count - 1."""
        return 1 + 4 * len(self.matches)

    def number(self, match: int, from_others: bool, is_sampled: bool) -> int:
        """Ordered by match, within source, within greedy before sampled."""
        return 1 + self.matches.index(match) + len(self.matches) * (from_others + 2 * is_sampled)
