"""Every kind of copy has a number of its own, and there are no others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.copy_kinds import NO_COPY, CopyKinds


@given(st.sets(st.integers(1, 20), min_size=1).map(sorted), st.integers(1, 4))
def test_numbers(matches: list[int], agreements: int) -> None:
    kinds, both = CopyKinds(tuple(matches), agreements), (False, True)
    numbers = [
        kinds.number(match, source, sampled, agreement)
        for match in matches
        for source in both
        for sampled in both
        for agreement in range(agreements)
    ]
    assert sorted([NO_COPY, *numbers]) == list(range(kinds.count))
    usual = kinds.usual
    assert len(usual) == kinds.count and usual[NO_COPY] == 0.0
    assert all(usual[kinds.number(match, True, False)] == match / (match + 2) for match in matches)
    assert sorted(usual[number] for number in numbers) == [usual[number] for number in numbers]  # longer is likelier
