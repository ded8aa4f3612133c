"""Counts of copies: what is read is what was added, and many verdicts at once weigh as one after the other."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.acceptance import Acceptance, faded_sum
from aurora_vllm.control.copy_counts import COPIED, NUM_KINDS, CountsLayout, CountsReader
from aurora_vllm.control.copying import Copies

POSITIONS = 3


class Noted:
    """In place of Copies: what it is told, how often."""

    def __init__(self) -> None:
        self.told: Counter[tuple[Any, ...]] = Counter()

    def take(self, seen: list[int], compared: Any, simulated: Any) -> None:
        self.told.update({("seen", kind): count for kind, count in enumerate(seen) if count})
        for kind, (gain, count) in compared.items():
            self.told["compared", kind] += count
            self.told["gained", kind] += gain
        for kind, those in simulated.items():
            self.told.update({("simulated", kind, *pair): count for pair, count in those.items()})

    def verdicts(self, version: int | None, those: Any) -> None:
        self.told.update({("verdict", version, *pair): count for pair, count in those.items()})


KIND, TOKENS = st.integers(0, NUM_KINDS - 1), st.integers(0, POSITIONS)
EVENTS = st.one_of(
    st.tuples(st.just("seen"), KIND),
    st.tuples(st.just("compared"), KIND, st.booleans(), st.booleans()),
    st.tuples(st.just("simulated"), KIND, st.just(POSITIONS), TOKENS),
    st.tuples(st.just("verdict"), st.sampled_from([0, 1, COPIED]), TOKENS, TOKENS),
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
        versions = (10 + number, 20 + number, None)  # of origins 0 and 1; COPIED
        sums[layout.versions : layout.size] = versions[:2]
        for event in events:
            sums[place(event)] += 1
            who = (versions[event[1]],) if event[0] == "verdict" else (event[1],)
            expected[event[0], *who, *(() if event[0] == "compared" else event[2:])] += 1
            if event[0] == "compared":
                expected["gained", event[1]] += event[2] - event[3]
        reader.read(sums, noted, noted.verdicts)  # type: ignore[arg-type]
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
        together.take({(drafts, accepted): count})
        for _ in range(count):
            one.observe(drafts, accepted)
    assert together.trials == pytest.approx(one.trials) and together.hits == pytest.approx(one.hits)


def test_what_is_known_of_copies_does_not_grow_for_ever() -> None:
    copies = Copies(POSITIONS, [0.0] * NUM_KINDS)
    copies.take([0, 0, 0, 1_000_000, *[0] * (NUM_KINDS - 4)], {}, {})
    copies.take([1000, *[0] * (NUM_KINDS - 1)], {}, {})
    assert dict(copies.shares())[0] > 0.2  # what is new counts


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_many_verdicts_at_once_say_what_few_do(batch: int) -> None:
    """A fetch of a large batch holds more than estimators remember: by outcome, all that failed would come first."""
    rng, layout, copies, drafts = random.Random(0), CountsLayout(POSITIONS), Copies(POSITIONS, [0.0] * NUM_KINDS), []
    reader, sums, estimate = CountsReader(POSITIONS), [0] * layout.size, Acceptance(POSITIONS)

    def right() -> int:
        return next((i for i in range(POSITIONS) if rng.random() >= 0.6), POSITIONS)

    def take(version: int | None, verdicts: Any) -> None:
        drafts.append(version)
        estimate.take(verdicts)

    for _ in range(max(10, 1000 // (16 * batch))):
        for _ in range(16 * batch):
            sums[layout.simulated + 4 * 2 + right()] += 1
            sums[layout.verdicts + 4 * 3 + right()] += 1
            sums[layout.compared + 4 * 2 + 2 * (rng.random() < 0.4) + (rng.random() < 0.6)] += 1
            sums[layout.seen + rng.choice([0, 0, 0, 2])] += 1
        reader.read(list(sums), copies, take)
    assert copies.chain(2) == pytest.approx([0.6, 0.36, 0.22], abs=0.06)

    assert estimate.accepted()[3] == pytest.approx(0.6 + 0.36 + 0.22, abs=0.15)
    assert not copies.preferred(2)
    assert dict(copies.shares())[2] == pytest.approx(0.25, abs=0.06)
