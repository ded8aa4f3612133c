"""An index of a text: where its newest tokens occurred before, and how the text went on from there.

Occurrences of each token and of each pair of tokens are chained, as in a Lempel-Ziv coder. Where several occurrences
match equally far, they vote on each token that follows (SuffixDecoding, Oliaro et al., 2024, counts the same way in
suffix trees): what followed most of them is right more often than what followed the newest.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

LONGEST_MATCH = 10  # tokens; longer matches are not right more often
PAIRS = 32  # occurrences of the last two tokens that are tried, the newest first
SINGLES = 8  # occurrences of the last token, where the last two have none
SEPARATOR = -1  # ends a text within the text; no token has this id


class Agreement(IntEnum):
    """What the occurrences of the longest match say about the token that follows."""

    ALONE = 0  # there is one occurrence
    AGREED = 1  # all of several name the same token
    SPLIT = 2  # they name different tokens


@dataclass(frozen=True)
class Continuation:
    """How the text went on after the longest match: tokens, how many tokens matched, and who agreed on the first."""

    tokens: list[int]
    match_length: int
    agreement: Agreement


class TextIndex:
    """The index of one text, which grows at its end."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self._pairs = _Chains()
        self._singles = _Chains()

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            end = len(self.tokens)
            self._pairs.add(_pair(self.tokens[end - 1], token) if end else None, end)
            self._singles.add(token, end)
            self.tokens.append(token)

    def own_continuation(self, count: int) -> Continuation | None:
        """``count`` tokens that followed the text's own end earlier in it; None if it is new.

        Where an occurrence is so near the end that fewer tokens follow it, it continues with what is being proposed, as
        in a text that repeats a short phrase.
        """
        last = len(self.tokens) - 1
        if last < 0:
            return None
        return self._continuation(self.tokens, self._pairs.older[last], self._singles.older[last], count, True)

    def continuation(self, text: Sequence[int], count: int) -> Continuation | None:
        """Up to ``count`` tokens that followed the end of another text in this one; None if it does not occur."""
        if not text:
            return None
        pair = self._pairs.newest.get(_pair(text[-2], text[-1]), -1) if len(text) > 1 else -1
        return self._continuation(text, pair, self._singles.newest.get(text[-1], -1), count, False)

    def _continuation(
        self, text: Sequence[int], pair: int, single: int, count: int, is_own: bool
    ) -> Continuation | None:
        """pair, single: where the newest occurrences of the last two tokens and of the last token end; -1 for none."""
        ends, length = self._longest_matches(text, pair, self._pairs.older, 2, PAIRS)
        if not ends:
            ends, length = self._longest_matches(text, single, self._singles.older, 1, SINGLES)
        tokens, agreement = list[int](), Agreement.ALONE
        while len(ends) > 1 and len(tokens) < count:
            following = [self._after(end, tokens, is_own) for end in ends]
            votes = Counter(following)
            del votes[SEPARATOR]
            if not votes:
                break
            token = max(votes, key=votes.__getitem__)  # of equally many votes, those of the newest occurrence
            if not tokens and votes.total() > 1:
                agreement = Agreement.AGREED if len(votes) == 1 else Agreement.SPLIT
            tokens.append(token)
            ends = [end for end, vote in zip(ends, following, strict=True) if vote == token]
        if len(ends) == 1:  # it followed what was voted for so far
            tokens = self._copied(ends[0], count, is_own)
        return Continuation(tokens, length, agreement) if tokens else None

    def _after(self, end: int, tokens: Sequence[int], is_own: bool) -> int:
        """What followed an occurrence and these tokens."""
        at = end + 1 + len(tokens)
        if at < len(self.tokens):
            return self.tokens[at]
        return tokens[at - len(self.tokens)] if is_own else SEPARATOR

    def _copied(self, end: int, count: int, is_own: bool) -> list[int]:
        """What followed one occurrence."""
        following = self.tokens[end + 1 : end + 1 + count].tolist()
        if is_own:
            return [following[i % len(following)] for i in range(count)]
        return following[: following.index(SEPARATOR)] if SEPARATOR in following else following

    def _longest_matches(
        self, text: Sequence[int], candidate: int, older: Sequence[int], known: int, tries: int
    ) -> tuple[list[int], int]:
        """Where the longest matches with the end of ``text`` end, the newest first, and their length.

        Args:
            candidate: where the newest occurrence of the last ``known`` tokens ends; -1 for none.
            older: leads from each occurrence to the one before it.
            tries: occurrences to look at.
        """
        tokens, last = self.tokens, len(text) - 1
        best, longest = list[int](), 0
        for _ in range(tries):
            if candidate < 0:
                break
            length, limit = known, min(LONGEST_MATCH, candidate + 1, last + 1)
            while length < limit and tokens[candidate - length] == text[last - length]:
                length += 1
            if length > longest:
                best, longest = [candidate], length
            elif length == longest:
                best.append(candidate)
            candidate = older[candidate]
        return best, longest


class _Chains:
    """For each key, where its occurrences end: the newest, and from each the one before it (-1: none)."""

    def __init__(self) -> None:
        self.newest: dict[int, int] = {}
        self.older = array("i")

    def add(self, key: int | None, end: int) -> None:
        if key is None:
            self.older.append(-1)
            return
        self.older.append(self.newest.get(key, -1))
        self.newest[key] = end


def _pair(first: int, second: int) -> int:
    return first << 32 | second
