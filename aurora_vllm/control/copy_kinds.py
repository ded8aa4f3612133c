"""Kinds of copies: alike in how far they can be trusted, and judged together."""

from __future__ import annotations

from dataclasses import dataclass

NO_COPY = 0  # the kind of a proposal for which there is nothing to copy


@dataclass(frozen=True)
class CopyKinds:
    """A kind is where a copy comes from, how many tokens before it stood there as well, and whether the request is
    sampled: such requests take copies up less often, and greedy ones must not speak for them.

    Args:
        matches: numbers of matching tokens that are told apart.
    """

    matches: tuple[int, ...]

    @property
    def count(self) -> int:
        """Of all kinds, :data:`NO_COPY` included; their numbers are 0 to count - 1."""
        return 1 + 4 * len(self.matches)

    def number(self, match: int, from_others: bool, is_sampled: bool) -> int:
        """By match first, then by source, greedy requests' kinds before those of sampled ones."""
        return 1 + self.matches.index(match) + len(self.matches) * (from_others + 2 * is_sampled)
