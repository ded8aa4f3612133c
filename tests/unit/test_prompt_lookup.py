"""The index of a text against a search through all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.prompt_lookup import (
    CANDIDATES,
    LONGEST_MATCH,
    WINDOW,
    Copy,
    EarlierAnswers,
    PromptLookup,
)

texts = st.lists(st.integers(0, 3), max_size=40)


def search(text: list[int], count: int) -> Copy | None:
    """Longest earlier occurrence of the end of ``text``, the newest of those equally long, continued into itself."""
    for length in range(min(LONGEST_MATCH, len(text) - 1), 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                grown = list(text)
                for i in range(count):
                    grown.append(grown[start + length + i])
                return Copy(grown[len(text) :], length)
    return None


@given(texts, st.integers(1, 5))
def test_it_finds_the_longest_match(text: list[int], count: int) -> None:
    lookup = PromptLookup()
    lookup.extend(text)
    occurrences = sum(text[i : i + 2] == text[-2:] for i in range(len(text) - 2))
    if occurrences <= CANDIDATES:
        assert lookup.propose(count) == search(text, count)


@given(texts, st.data())
def test_it_does_not_matter_in_how_many_pieces_the_text_came(text: list[int], data: st.DataObject) -> None:
    whole, parts = PromptLookup(), PromptLookup()
    whole.extend(text)
    cut = data.draw(st.integers(0, len(text)))
    parts.extend(text[:cut])
    parts.extend(text[cut:])
    assert len(parts) == len(whole) == len(text)
    assert parts.propose(3) == whole.propose(3)


def test_a_short_phrase_repeated_goes_on_for_ever() -> None:
    lookup = PromptLookup()
    lookup.extend([9, 1, 2, 1, 2])
    assert lookup.propose(5) == Copy([1, 2, 1, 2, 1], 2)


def test_of_a_long_prompt_the_end_is_indexed() -> None:
    lookup = PromptLookup()
    lookup.extend([*range(WINDOW), 7, 8, 9, *range(5000, 5005)])
    assert len(lookup) == WINDOW + 8
    assert lookup.propose(2) == Copy([5005, 5006], 5)
    lookup.extend([0, 1])  # these stood together only in the part that was left out
    assert lookup.propose(2) is None
    assert len(lookup) == WINDOW + 10


@given(st.lists(texts, max_size=4), texts.filter(lambda text: len(text) > 1))
def test_earlier_answers_are_searched_as_one_text_with_gaps(answers: list[list[int]], text: list[int]) -> None:
    earlier = EarlierAnswers(1000)
    for answer in answers:
        earlier.add(answer)
    found = earlier.propose(text, 3)
    # Every occurrence of the end of the text, with what followed it in the same answer, the newest last.
    matches = {
        length: [
            answer[start + length : start + length + 3]
            for answer in answers
            for start in range(len(answer) - length + 1)
            if answer[start : start + length] == text[-length:]
        ]
        for length in range(2, min(LONGEST_MATCH, len(text)) + 1)
    }
    if len(matches[2]) > CANDIDATES:
        return
    longest = max((length for length, after in matches.items() if after), default=0)
    if not longest or not matches[longest][-1]:
        assert found is None
    else:
        assert found == Copy(matches[longest][-1], longest, from_others=True)


def test_of_many_answers_the_newest_are_remembered() -> None:
    earlier = EarlierAnswers(20)
    for first in range(0, 100, 5):
        earlier.add(range(first, first + 5))
        assert len(earlier._index.tokens) <= 20
    assert earlier.propose([95, 96], 3) == Copy([97, 98, 99], 2, from_others=True)
    assert earlier.propose([0, 1], 3) is None
    earlier.add(range(200, 300))
    assert earlier.propose([297, 298], 3) == Copy([299], 2, from_others=True)
    assert earlier.propose([200, 201], 3) is None


@given(st.integers(1, 12), st.lists(texts, max_size=8))
def test_never_more_is_remembered_than_was_asked_for(capacity: int, answers: list[list[int]]) -> None:
    earlier = EarlierAnswers(capacity)
    for answer in answers:
        earlier.add(answer)
        assert len(earlier._index.tokens) <= capacity
