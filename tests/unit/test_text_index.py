"""The index of a text against a search through all of it."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.text_index import (
    LONGEST_MATCH,
    PAIRS,
    SEPARATOR,
    SINGLES,
    Agreement,
    Continuation,
    TextIndex,
)

texts = st.lists(st.integers(0, 3), max_size=40)


def index(text: list[int]) -> TextIndex:
    made = TextIndex()
    made.extend(text)
    return made


def search(searched: list[int], text: list[int], count: int, is_own: bool) -> Continuation | None:
    """Votes of the longest match's occurrences, by going through the whole text."""
    for length in range(min(LONGEST_MATCH, len(text)), 0, -1):
        last = len(searched) - length - is_own  # a text's own end is no earlier occurrence
        starts = [at for at in range(last, -1, -1) if searched[at : at + length] == text[len(text) - length :]]
        if starts:
            return _vote(searched, starts[: PAIRS if length > 1 else SINGLES], length, count, is_own)
    return None


def _vote(searched: list[int], starts: list[int], length: int, count: int, is_own: bool) -> Continuation | None:
    """starts: of the occurrences, the newest first."""
    tokens, agreement = list[int](), Agreement.ALONE
    while len(tokens) < count:
        whole = [*searched, *tokens] if is_own else searched
        ends = [(at, at + length + len(tokens)) for at in starts]
        following = [(at, whole[end]) for at, end in ends if end < len(whole) and whole[end] != SEPARATOR]
        votes = Counter(token for _, token in following)
        if not votes:
            break
        if not tokens and len(following) > 1:
            agreement = Agreement.AGREED if len(votes) == 1 else Agreement.SPLIT
        tokens.append(next(token for _, token in following if votes[token] == max(votes.values())))
        starts = [at for at, token in following if token == tokens[-1]]
    return Continuation(tokens, length, agreement) if tokens else None


def few_enough(searched: list[int], text: list[int]) -> bool:
    """Whether the index looks at all occurrences of the last two tokens. (The newest SINGLES of one are enough.)"""
    return sum(searched[i : i + 2] == text[-2:] for i in range(len(searched) - 1)) <= PAIRS


@given(texts, st.integers(1, 6))
def test_a_text_goes_on_as_most_of_its_longest_matches_did(text: list[int], count: int) -> None:
    assume(few_enough(text, text))
    assert index(text).own_continuation(count) == search(text, text, count, is_own=True)


@given(st.lists(texts, max_size=4), texts, st.integers(1, 6))
def test_so_does_another_text(parts: list[list[int]], text: list[int], count: int) -> None:
    searched = [token for part in parts for token in (*part, SEPARATOR)]
    assume(few_enough(searched, text))
    assert index(searched).continuation(text, count) == search(searched, text, count, is_own=False)


@given(texts, st.data())
def test_it_does_not_matter_in_how_many_pieces_a_text_came(text: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(text)))
    parts = index(text[:cut])
    parts.extend(text[cut:])
    assert list(parts.tokens) == text
    assert parts.own_continuation(3) == index(text).own_continuation(3)


def test_more_than_two_tokens_in_common_win_over_the_number_of_occurrences() -> None:
    text = [1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 5, 1, 2, 3]
    assert index(text).own_continuation(2) == Continuation([4, 9], 3, Agreement.ALONE)


def test_of_equally_long_matches_most_win_and_of_equally_many_the_newest() -> None:
    most = index([7, 1, 7, 1, 7, 2, 7])
    assert most.own_continuation(1) == Continuation([1], 1, Agreement.SPLIT)
    assert index([7, 1, 7, 2, 7]).own_continuation(1) == Continuation([2], 1, Agreement.SPLIT)
    assert index([7, 1, 5, 7, 1, 6, 7]).own_continuation(2) == Continuation([1, 6], 1, Agreement.AGREED)


def test_nothing_follows_from_nothing() -> None:
    assert index([]).own_continuation(3) is None and index([1]).own_continuation(3) is None
    assert index([]).continuation([1, 2], 3) is None and index([1, 2]).continuation([], 3) is None
    assert index([1, 2]).continuation([1, 2], 3) is None  # it ends there
    assert index([1, 2]).continuation([9, 1], 3) == Continuation([2], 1, Agreement.ALONE)
