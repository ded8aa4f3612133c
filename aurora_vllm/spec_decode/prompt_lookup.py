"""Prompt lookup: proposes what followed an earlier occurrence of the newest tokens of a request.

Text repeats itself: code repeats the names of its variables, an answer the words of its question, and answers to
similar questions begin and end alike. The continuation of the longest match is a draft that costs no forward pass
(Saxena, "Prompt Lookup Decoding", 2023; vLLM's methods "ngram", within a request, and "suffix", across requests: Oliaro
et al., "SuffixDecoding", 2024). How many tokens matched, and whether their occurrences agree on what follows, tells
whether a copy can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aurora_vllm.control.copy_kinds import CopyKinds
from aurora_vllm.spec_decode.text_index import LONGEST_MATCH, SEPARATOR, Agreement, Continuation, TextIndex

WINDOW = 8192  # tokens at the end of a prompt that are indexed: about 6 ms and 1 MB, once a request
KINDS = CopyKinds(tuple(range(1, LONGEST_MATCH + 1)), len(Agreement))


@dataclass(frozen=True)
class Copy:
    """Proposed tokens, how many tokens before them matched (1..LONGEST_MATCH), and who agreed on the first of them."""

    tokens: list[int]
    match_length: int
    agreement: Agreement
    from_others: bool = False

    def kind(self, is_sampled: bool = False) -> int:
        """The kind of this copy for a greedy or a sampled request."""
        return KINDS.number(self.match_length, self.from_others, is_sampled, self.agreement)


class PromptLookup:
    """The text of one request."""

    def __init__(self) -> None:
        self._index = TextIndex()
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
        """``count`` tokens that followed the longest matches within the request; None without a match."""
        return _copy(self._index.own_continuation(count), from_others=False)


class EarlierAnswers:
    """The newest answers to other requests.

    Args:
        capacity: in tokens. When it is full the older half is dropped, which takes about 30 ms for 32,768 tokens.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._index = TextIndex()

    def add(self, answer: Sequence[int]) -> None:
        """Add a finished answer; of one longer than about half the capacity, only its end."""
        half, there = (self._capacity - 1) // 2, len(self._index.tokens)
        answer = answer[max(0, len(answer) - half) :]
        if there + len(answer) + 1 > self._capacity:
            kept = self._index.tokens[max(0, there - half) :]
            self._index = TextIndex()
            self._index.extend(kept)
        self._index.extend([*answer, SEPARATOR])

    def propose(self, text: Sequence[int], count: int) -> Copy | None:
        """Up to ``count`` tokens that followed the longest matches with the end of ``text``; None without a match."""
        return _copy(self._index.continuation(text, count), from_others=True)


def _copy(found: Continuation | None, from_others: bool) -> Copy | None:
    return None if found is None else Copy(found.tokens, found.match_length, found.agreement, from_others)
