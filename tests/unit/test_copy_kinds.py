"""Every kind of copy has a number of its own, and there are no others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.copy_kinds import NO_COPY, CopyKinds


@given(st.sets(st.integers(1, 20), min_size=1).map(sorted))
def test_numbers(matches: list[int]) -> None:
    kinds, both = CopyKinds(tuple(matches)), (False, True)
    numbers = [kinds.number(match, source, sampled) for match in matches for source in both for sampled in both]
    assert sorted([NO_COPY, *numbers]) == list(range(kinds.count))
