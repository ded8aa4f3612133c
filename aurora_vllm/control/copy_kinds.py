"""Kinds of copies. Those of one kind are about equally reliable, and are judged together."""

from __future__ import annotations

from dataclasses import dataclass

NO_COPY = 0  # the kind where there is nothing to copy


@dataclass(frozen=True)
class CopyKinds:
    """A kind is a source (the request itself or others), a number of matching tokens before the copy, what the
    occurrences of these say about its first token, and whether the request is sampled: sampled requests accept copies
    less often than greedy ones, so they are counted apart.

    Args:
        matches: the numbers of matching tokens that are distinguished.
        agreements: how many answers there are to what the occurrences say; 1 where they are not asked.
    """

    matches: tuple[int, ...]
    agreements: int = 1

    @property
    def count(self) -> int:
        """Of all kinds, :data:`NO_COPY` included; their numbers are 0 to count - 1."""
        return 1 + 4 * self.agreements * len(self.matches)

    @property
    def usual(self) -> list[float]:
        """For each kind, a chance that is about right for each token of a copy, given those before it: n / (n + 2)
        where n tokens matched. It was found in code, function calls and mathematics alike; see docs/decisions.md."""
        return [0.0] + [match / (match + 2) for match in self.matches] * (4 * self.agreements)

    def number(self, match: int, from_others: bool, is_sampled: bool, agreement: int = 0) -> int:
        """Ordered by match, within agreement, within source, within greedy before sampled."""
        group = agreement + self.agreements * (from_others + 2 * is_sampled)
        return 1 + self.matches.index(match) + len(self.matches) * group
