"""Prices of a decode step, fitted to simulated machines whose prices are known."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.step_costs import STEPS_TO_KNOW, StepCosts, batch_bucket


def test_buckets() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 33)] == [1, 2, 3, 4, 8, 8, 16, 64]


def test_nothing_is_known_before_plain_decoding_was_seen() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.observe(4, 3, 12, 2.0)
        assert not costs.known(4)
    for _ in range(STEPS_TO_KNOW):
        assert not costs.known(4)
        costs.observe(4, 0, 0, 1.0)
    assert costs.known(4) and not costs.known(1)
    with pytest.raises(KeyError):
        costs.predict(1)


@settings(max_examples=60, derandomize=True)
@given(st.floats(0.0, 0.2), st.floats(0.0, 0.1), st.floats(0.0, 0.3), st.integers(0, 100))
def test_prices_are_found(verify: float, token: float, draft: float, seed: int) -> None:
    """Verified numbers vary by themselves; at times nothing is drafted. Bursts of another process hit some steps."""
    rng, costs = random.Random(seed), StepCosts()
    for step in range(600):
        drafted = 0 if step % 160 < 8 else 3
        verified = rng.randint(0, 4 * 3) if drafted else rng.choice([0, 0, 3])
        seconds = 1.0 + verify * (verified > 0) + token * verified + draft * drafted
        costs.observe(4, drafted, verified, seconds * rng.uniform(0.97, 1.03) * (4.0 if rng.random() < 0.01 else 1.0))
    for drafted, verified in ((0, 0), (3, 4), (3, 12)):
        truth = 1.0 + verify * (verified > 0) + token * verified + draft * drafted
        assert costs.predict(4, drafted, verified) == pytest.approx(truth, rel=0.15)


def test_before_any_experience_proposals_are_cheap_but_not_free() -> None:
    costs = StepCosts()
    for _ in range(STEPS_TO_KNOW):
        costs.observe(1, 0, 0, 0.05)
    assert 0.05 < costs.predict(1, 0, 1) < costs.predict(1, 1, 1) < costs.predict(1, 3, 3) < 0.07
    assert costs.per_token(1) > 0


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_a_token_more_of_each_request_is_tried_on_any_batch(batch: int) -> None:
    """And where it is dear, a few steps tell."""
    costs = StepCosts(uniform=True)
    for _ in range(STEPS_TO_KNOW):
        costs.observe(batch, 0, 0, 0.05)
    assert 0.05 < costs.predict(batch, 0, batch) < 0.05 * 1.1
    for _ in range(5):
        costs.observe(batch, 0, batch, 0.065)
    assert costs.predict(batch, 0, batch) == pytest.approx(0.065, rel=0.1)


def test_a_machine_that_became_slower_is_noticed() -> None:
    costs = StepCosts()
    for step in range(1000):
        costs.observe(1, 0, 0, 1.0 if step < 400 else 1.6)
    assert costs.predict(1) == pytest.approx(1.6, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.floats(1e-4, 10.0)), max_size=60))
def test_no_price_is_ever_below_nothing(steps: list[tuple[int, int, float]]) -> None:
    costs = StepCosts()
    for _ in range(STEPS_TO_KNOW):
        costs.observe(4, 0, 0, 0.1)
    for drafted, verified, seconds in steps:
        costs.observe(4, drafted, verified, seconds)
        assert costs.per_token(4) >= 0
        assert 0 <= costs.predict(4) <= costs.predict(4, 3, 12)
