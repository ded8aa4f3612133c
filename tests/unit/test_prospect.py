"""What a good draft would gain: on machines whose prices are known, beside copies and without them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.copying import Copies
from aurora_vllm.control.prospect import GOOD, prospect
from aurora_vllm.control.rating import Rating
from aurora_vllm.control.step_costs import StepCosts

BATCH, POSITIONS = 4, 3
prices = st.floats(0.001, 0.3)


def rating(token: float, draft: float, cut: bool = False) -> Rating:
    """A machine with these prices of a verified and of a drafted token, in plain steps; the time of a step is noted
    often enough to outweigh the prior."""
    costs = StepCosts()
    for step in range(2000):
        drafted, verified = (0, 0) if step % 4 == 0 else (step % 3 + 1, step % 13)
        costs.observe(BATCH, drafted, verified, 1.0 + token * verified + draft * drafted)
    return Rating(costs, BATCH, price=token * BATCH, cut=cut, uniform=False)


def copies(share: float, chance: float) -> Copies:
    """Copies for this share of proposals, of which two tokens are right with this chance, else none."""
    made = Copies(POSITIONS, [0.0, 0.5])
    for i in range(1000):
        is_there, right = (i * 0.618) % 1 < share, (i * 0.414) % 1 < chance
        made.seen(int(is_there))
        if is_there:
            made.simulate(1, 2, 2 if right else 0)
    return made


@given(prices, prices)
def test_without_copies_it_is_the_best_length_of_a_good_draft(token: float, draft: float) -> None:
    tokens = [sum(GOOD**i for i in range(k + 1)) for k in range(POSITIONS + 1)]
    best = max(tokens[k] / (1 + k * (BATCH * token + draft)) for k in range(1, POSITIONS + 1))
    assert prospect(rating(token, draft), None, POSITIONS) == pytest.approx(best, rel=0.05)


@given(prices, prices, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_copies_add_to_it(token: float, draft: float, share: float, chance: float) -> None:
    machine = rating(token, draft)
    alone = prospect(machine, None, POSITIONS)
    better = prospect(machine, copies(share, chance), POSITIONS)
    assert better >= alone * (1 - 1e-9) or token > 0.05  # a longer copy may cost more than it gains: it is not cut here


def test_where_copies_are_always_right_a_draft_adds_only_cost() -> None:
    machine, found = rating(0.01, 0.1), copies(share=1.0, chance=1.0)
    assert prospect(machine, found, POSITIONS) < (1 + found.expected(1)) / (1 + 2 * BATCH * 0.01)


def test_of_an_expensive_machine_nothing_is_to_be_expected() -> None:
    assert prospect(rating(0.3, 0.3, cut=True), None, POSITIONS) < 1.0 < prospect(rating(0.01, 0.05), None, POSITIONS)
