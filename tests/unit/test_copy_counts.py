"""Counts of copies: what is read is what was added, and many verdicts at once weigh as one after the other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.acceptance import Acceptance, faded_sum
from aurora_vllm.control.copy_counts import COPIED, DRAFTED_EVEN, DRAFTED_ODD, KINDS, CountsLayout, CountsReader
from aurora_vllm.control.copying import Copies

POSITIONS = 3


class Noted:
    """In place of Copies: what it is told, how often."""

    def __init__(self) -> None:
        self.told: Counter[tuple[Any, ...]] = Counter()

    def seen(self, kind: int, count: int) -> None:
        self.told["seen", kind] += count

    def compare(self, kind: int, copy: bool, draft: bool, count: int) -> None:
        self.told["compared", kind, copy, draft] += count

    def simulate(self, kind: int, drafts: int, accepted: int, count: int) -> None:
        self.told["simulated", kind, drafts, accepted] += count

    def verdict(self, version: int | None, drafts: int, accepted: int, count: int) -> None:
        self.told["verdict", version, drafts, accepted] += count


KIND, TOKENS = st.integers(0, KINDS - 1), st.integers(0, POSITIONS)
EVENTS = st.one_of(
    st.tuples(st.just("seen"), KIND),
    st.tuples(st.just("compared"), KIND, st.booleans(), st.booleans()),
    st.tuples(st.just("simulated"), KIND, st.just(POSITIONS), TOKENS),
    st.tuples(st.just("verdict"), st.sampled_from([DRAFTED_EVEN, DRAFTED_ODD, COPIED]), TOKENS, TOKENS),
)


def place(event: tuple[Any, ...]) -> int:
    """Written down once more, as the kernel counts."""
    layout, (what, kind, *rest) = CountsLayout(POSITIONS), event
    if what == "seen":
        return layout.seen + kind
    if what == "compared":
        return layout.compared + 4 * kind + 2 * rest[0] + rest[1]
    if what == "simulated":
        return layout.simulated + 4 * kind + rest[1]
    return layout.verdicts + 16 * kind + 4 * rest[0] + rest[1]


@given(st.lists(st.lists(EVENTS, max_size=30), max_size=4))
def test_each_look_takes_in_what_was_added(looks: list[list[Any]]) -> None:
    layout, reader, noted, expected = CountsLayout(POSITIONS), CountsReader(POSITIONS), Noted(), Counter[Any]()
    sums = [0] * (layout.size + 29)  # shared memory holds more than that
    for number, events in enumerate(looks):
        versions = (10 + number, 20 + number, None)  # DRAFTED_EVEN, DRAFTED_ODD, COPIED
        sums[layout.versions : layout.size] = versions[:2]
        for event in events:
            sums[place(event)] += 1
            who = (versions[event[1]],) if event[0] == "verdict" else (event[1],)
            expected[event[0], *who, *event[2:]] += 1
        reader.read(sums, noted, noted.verdict)  # type: ignore[arg-type]
        assert noted.told == expected


@given(st.floats(-50, 50), st.floats(-1, 1), st.integers(1, 300), st.floats(2, 1000))
def test_many_at_once_weigh_as_one_after_the_other(total: float, item: float, count: int, memory: float) -> None:
    expected = total
    for _ in range(count):
        expected = expected * (1.0 - 1.0 / memory) + item
    assert faded_sum(total, item, count, memory) == pytest.approx(expected, abs=1e-6, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 20)), max_size=8))
def test_verdicts_that_are_alike_may_come_together(verdicts: list[tuple[int, int, int]]) -> None:
    one, together = Acceptance(POSITIONS), Acceptance(POSITIONS)
    for drafts, accepted, count in verdicts:
        accepted = min(accepted, drafts)
        together.observe(drafts, accepted, count)
        for _ in range(count):
            one.observe(drafts, accepted)
    assert together.trials == pytest.approx(one.trials) and together.hits == pytest.approx(one.hits)


def test_what_is_known_of_copies_does_not_grow_for_ever() -> None:
    copies = Copies(POSITIONS, KINDS)
    copies.seen(3, 1_000_000)
    copies.seen(0, 1000)
    assert dict(copies.shares())[0] > 0.2  # what is new counts
