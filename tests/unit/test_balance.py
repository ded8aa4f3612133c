"""Has speculation been losing: said soon where it has, seldom where it has not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.balance import FEWEST, LEAST, Balance


@given(st.floats(1.01 * LEAST, 5.0))
def test_losing_all_the_time_is_said_at_once(loss: float) -> None:
    balance = Balance()
    said = [balance.observe(-loss) for _ in range(40)]
    assert said.index(True) < 1.6 * FEWEST
    assert not balance.observe(-loss)  # it begins anew


@given(st.lists(st.floats(-LEAST, 5.0), max_size=100))
def test_who_never_loses_much_is_never_accused(gains: list[float]) -> None:
    balance = Balance()
    assert not any(balance.observe(gain) for gain in gains)


@pytest.mark.parametrize(("chance", "most"), [(0.5, 4), (0.3, 60)])
def test_rare_gains_weigh_against_small_losses(chance: float, most: int) -> None:
    """A proposal costs a quarter of a step; one in two brings a whole one, or barely enough of them."""
    rng, balance = random.Random(0), Balance()
    said = sum(balance.observe(0.75 if rng.random() < chance else -0.25) for _ in range(4000))
    assert said <= most


def test_a_time_of_gains_is_soon_forgotten() -> None:
    balance = Balance()
    for _ in range(1000):
        assert not balance.observe(2.0)
    said = [balance.observe(-0.5) for _ in range(120)]
    assert said.index(True) < 80
