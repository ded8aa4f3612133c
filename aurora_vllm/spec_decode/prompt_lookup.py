"""Prompt lookup: proposes what followed an earlier occurrence of the newest tokens of a request.

Text repeats itself: code repeats the names of its variables, an answer the words of its question, and answers to
similar questions begin and end alike. The continuation of the longest match is a draft that costs no forward pass
(Saxena, "Prompt Lookup Decoding", 2023; vLLM's methods "ngram", within a request, and "suffix", across requests: Oliaro
et al., "SuffixDecoding", 2024). How many tokens matched tells whether a copy can be trusted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from aurora_vllm.control.copy_kinds import CopyKinds

LONGEST_MATCH = 10  # tokens; longer matches are not right more often
CANDIDATES = 32  # earlier occurrences of the last two tokens that are tried, the newest first
WINDOW = 8192  # tokens at the end of a prompt that are indexed: about 3 ms and 1 MB, once a request
SEPARATOR = -1  # between two answers; no token has this id
KINDS = CopyKinds(tuple(range(2, LONGEST_MATCH + 1)))


@dataclass(frozen=True)
class Copy:
    """Proposed tokens, and how many tokens before them matched (2..LONGEST_MATCH)."""

    tokens: list[int]
    match_length: int
    from_others: bool = False

    def kind(self, is_sampled: bool = False) -> int:
        """The kind of this copy for a greedy or a sampled request."""
        return KINDS.number(self.match_length, self.from_others, is_sampled)


class _PairIndex:
    """An index of a text by pairs of tokens. Each pair's occurrences are chained, as in a Lempel-Ziv coder."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.newest: dict[int, int] = {}  # pair -> where its newest occurrence ends
        self.older = array("i")  # where a pair ends -> where its previous occurrence ends, or -1

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            self.tokens.append(token)
            if not end:
                self.older.append(-1)
                continue
            pair = _pair(self.tokens[end - 1], token)
            self.older.append(self.newest.get(pair, -1))
            self.newest[pair] = end

    def longest_match(self, text: Sequence[int], candidate: int) -> tuple[int, int]:
        """The longest match with the end of ``text``, the newest if there are several: where it ends, and its length.

        Args:
            candidate: where the newest occurrence of the last two tokens ends; -1 for none.
        """
        tokens, last = self.tokens, len(text) - 1
        best, longest = -1, 0
        for _ in range(CANDIDATES):
            if candidate < 0 or longest == LONGEST_MATCH:
                break
            length, limit = 2, min(LONGEST_MATCH, candidate + 1, last + 1)
            while length < limit and tokens[candidate - length] == text[last - length]:
                length += 1
            if length > longest:
                best, longest = candidate, length
            candidate = self.older[candidate]
        return best, longest


class PromptLookup:
    """The text of one request."""

    def __init__(self) -> None:
        self._index = _PairIndex()
        self._skipped = 0

    def __len__(self) -> int:
        """Tokens of the request so far."""
        return self._skipped + len(self._index.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens of the request: first the prompt, later what was emitted."""
        if not len(self) and len(tokens) > WINDOW:
            self._skipped = len(tokens) - WINDOW
            tokens = tokens[self._skipped :]
        self._index.extend(tokens)

    def end(self) -> Sequence[int]:
        """The newest tokens, as many as a match can have."""
        return self._index.tokens[-LONGEST_MATCH:]

    def propose(self, count: int) -> Copy | None:
        """``count`` tokens that followed the longest match; None without a match.

        If the match is so near the end that fewer than ``count`` tokens follow it, the copy continues with itself, as
        in a text that repeats a short phrase.
        """
        tokens, last = self._index.tokens, len(self._index.tokens) - 1
        best, length = self._index.longest_match(tokens, self._index.older[last] if last > 0 else -1)
        if best < 0:
            return None
        period = last - best
        return Copy([tokens[best + 1 + i % period] for i in range(count)], length)


class EarlierAnswers:
    """The newest answers to other requests.

    Args:
        capacity: in tokens. When it is full the older half is dropped, which takes about 10 ms for 32,768 tokens.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._index = _PairIndex()

    def add(self, answer: Sequence[int]) -> None:
        """Add a finished answer; of one longer than about half the capacity, only its end."""
        half, there = (self._capacity - 1) // 2, len(self._index.tokens)
        answer = answer[max(0, len(answer) - half) :]
        if there + len(answer) + 1 > self._capacity:
            kept = self._index.tokens[max(0, there - half) :]
            self._index = _PairIndex()
            self._index.extend(kept)
        self._index.extend([*answer, SEPARATOR])

    def propose(self, text: Sequence[int], count: int) -> Copy | None:
        """Up to ``count`` tokens that followed the longest match with the end of ``text``; None without a match."""
        if len(text) < 2:
            return None
        best, length = self._index.longest_match(text, self._index.newest.get(_pair(text[-2], text[-1]), -1))
        following = self._index.tokens[best + 1 : best + 1 + count].tolist() if best >= 0 else []
        if SEPARATOR in following:
            following = following[: following.index(SEPARATOR)]
        return Copy(following, length, from_others=True) if following else None


def _pair(first: int, second: int) -> int:
    return first << 32 | second
