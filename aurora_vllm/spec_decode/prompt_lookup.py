"""Prompt lookup: what followed the last time the newest tokens of a request stood in it.

Text repeats itself: code names its variables again, an answer takes up the words of its question. The continuation of
the longest earlier occurrence of the newest tokens is a draft that costs no forward pass (Saxena, "Prompt Lookup
Decoding", 2023; vLLM's method "ngram"). vLLM's own function for it searches the whole text in every step and does not
say how many tokens matched, which is what tells whether a copy can be trusted; here the text is indexed once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_MATCH = 10  # tokens; a longer match is not more often right
CANDIDATES = 32  # earlier occurrences of the last two tokens that are looked at, the newest first
WINDOW = 8192  # tokens at the end of a prompt that are indexed: about 3 ms and 1 MB, once a request


@dataclass(frozen=True)
class Copy:
    """Proposed tokens, and how many tokens before them stood there before as well (2..LONGEST_MATCH)."""

    tokens: list[int]
    match_length: int


class PromptLookup:
    """The text of one request, by pairs of tokens. Each pair's occurrences are chained, as in a Lempel-Ziv coder."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._newest: dict[int, int] = {}  # pair -> where it ends, its newest occurrence
        self._older = array("i")  # where a pair ends -> where its occurrence before ends, or -1
        self._skipped = 0

    def __len__(self) -> int:
        """Tokens of the request so far."""
        return self._skipped + len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """More of the request: the prompt first, then what was emitted."""
        if not self._tokens and len(tokens) > WINDOW:
            self._skipped = len(tokens) - WINDOW
            tokens = tokens[self._skipped :]
        for token in tokens:
            end = len(self._tokens)
            self._tokens.append(token)
            if not end:
                self._older.append(-1)
                continue
            pair = self._tokens[end - 1] << 32 | token
            self._older.append(self._newest.get(pair, -1))
            self._newest[pair] = end

    def propose(self, count: int) -> Copy | None:
        """``count`` tokens that followed the longest match, the newest of those equally long; None without a match.

        Where the match lies so near the end that fewer than ``count`` tokens follow it, the copy goes on into itself,
        as a text that repeats a short phrase does.
        """
        tokens, last = self._tokens, len(self._tokens) - 1
        best, longest = -1, 0
        candidate = self._older[last] if last > 0 else -1
        for _ in range(CANDIDATES):
            if candidate < 0 or longest == LONGEST_MATCH:
                break
            length = 2
            while length < min(LONGEST_MATCH, candidate + 1) and tokens[candidate - length] == tokens[last - length]:
                length += 1
            if length > longest:
                best, longest = candidate, length
            candidate = self._older[candidate]
        if best < 0:
            return None
        period = last - best
        return Copy([tokens[best + 1 + i % period] for i in range(count)], longest)
