"""The index of a request's text against a search through all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.prompt_lookup import CANDIDATES, LONGEST_MATCH, WINDOW, Copy, PromptLookup

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
