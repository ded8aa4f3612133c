"""What is copied from a request and from earlier answers, and how much of them is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.prompt_lookup import WINDOW, Copy, EarlierAnswers, PromptLookup
from aurora_vllm.spec_decode.text_index import SEPARATOR, Agreement, TextIndex

texts = st.lists(st.integers(0, 3), max_size=40)


def test_a_short_phrase_repeated_goes_on_for_ever() -> None:
    lookup = PromptLookup()
    lookup.extend([9, 1, 2, 1, 2])
    assert lookup.propose(5) == Copy([1, 2, 1, 2, 1], 2, Agreement.ALONE)


def test_of_a_long_prompt_the_end_is_indexed() -> None:
    lookup = PromptLookup()
    lookup.extend([*range(WINDOW), 7, 8, 9, *range(5000, 5005)])
    assert len(lookup) == WINDOW + 8
    assert lookup.propose(2) == Copy([5005, 5006], 5, Agreement.ALONE)
    lookup.extend([0, 1])  # these stood only in the part that was left out
    assert lookup.propose(2) is None
    assert len(lookup) == WINDOW + 10


@given(st.lists(texts, max_size=4), texts)
def test_earlier_answers_are_one_text_with_gaps(answers: list[list[int]], text: list[int]) -> None:
    earlier, together = EarlierAnswers(1000), TextIndex()
    for answer in answers:
        earlier.add(answer)
        together.extend([*answer, SEPARATOR])
    found, expected = earlier.propose(text, 3), together.continuation(text, 3)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found == Copy(expected.tokens, expected.match_length, expected.agreement, from_others=True)


def test_of_many_answers_the_newest_are_remembered() -> None:
    earlier = EarlierAnswers(20)
    for first in range(0, 100, 5):
        earlier.add(range(first, first + 5))
        assert len(earlier._index.tokens) <= 20
    assert earlier.propose([95, 96], 3) == Copy([97, 98, 99], 2, Agreement.ALONE, from_others=True)
    assert earlier.propose([0, 1], 3) is None
    earlier.add(range(200, 300))
    assert earlier.propose([297, 298], 3) == Copy([299], 2, Agreement.ALONE, from_others=True)
    assert earlier.propose([200, 201], 3) is None


@given(st.integers(1, 12), st.lists(texts, max_size=8))
def test_never_more_is_remembered_than_was_asked_for(capacity: int, answers: list[list[int]]) -> None:
    earlier = EarlierAnswers(capacity)
    for answer in answers:
        earlier.add(answer)
        assert len(earlier._index.tokens) <= capacity
