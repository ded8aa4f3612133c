"""Probation against simulated drafts whose quality is known."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.acceptance import Acceptance
from aurora_vllm.control.rollout import LEAST_DRAFTS, PROBATION_DRAFTS, Probation, Rollout

LONG_ENOUGH = 2 * PROBATION_DRAFTS


def verdicts(chance: float, seed: int, draft_lengths: tuple[int, ...] = (3,), spread: float = 0.0) -> Iterator[tuple]:
    """Drafts and accepted drafts of four requests at once, 40 verifications each. chance: that a draft is accepted
    where those before it were; spread: its standard deviation from one request to the next."""
    rng = random.Random(seed)

    def request() -> list[float]:
        size = chance * (1 - chance) / spread**2 - 1 if spread else 0.0
        return [rng.betavariate(chance * size, (1 - chance) * size) if spread else chance, 40]

    running = [request() for _ in range(4)]
    while True:
        for i, (own, left) in enumerate(running):
            drafts = rng.choice(draft_lengths)
            accepted = 0
            while accepted < drafts and rng.random() < own:
                accepted += 1
            yield drafts, accepted
            running[i] = [own, left - 1] if left > 1 else request()


def known(chance: float, seed: int, count: int = 600, **how: object) -> Acceptance:
    acceptance = Acceptance(3)
    for _, (drafts, accepted) in zip(range(count), verdicts(chance, seed, **how), strict=False):  # type: ignore[arg-type]
        acceptance.observe(drafts, accepted)
    return acceptance


def trial(before: float, now: float, seed: int, confidence: float = 0.95, count: int = 600, **how: object) -> Probation:
    probation = Probation(known(before, 1000 + seed, count, **how), confidence)
    for _, verdict in zip(range(LONG_ENOUGH), verdicts(now, seed, **how), strict=False):  # type: ignore[arg-type]
        probation.observe(*verdict)
    return probation


@pytest.mark.parametrize("chance", [0.36, 0.7])
@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_an_equal_version_stays(chance: float, spread: float) -> None:
    """At most the stated share of false alarms, also where verdicts of a request resemble each other."""
    alarms = sum(trial(chance, chance, seed, spread=spread).decision == "rollback" for seed in range(100))
    assert alarms <= 5


def test_a_fall_from_1_5_to_1_1_is_found_within_200_verified_drafts() -> None:
    """Acceptance length 1 + p + p^2 + p^3: p = 0.345 gives 1.5, 0.092 gives 1.1."""
    trials = [trial(0.345, 0.092, seed) for seed in range(50)]
    assert all(one.decision == "rollback" for one in trials)
    within = sum(one.drafts <= 200 for one in trials)
    assert within >= 48
    assert all(one.drafts >= LEAST_DRAFTS for one in trials)


def test_a_version_that_accepts_nothing_is_found_at_once() -> None:
    trials = [trial(0.345, 0.0, seed) for seed in range(20)]
    assert max(one.drafts for one in trials) <= 80


def test_a_better_version_and_one_a_little_worse_stay() -> None:
    assert all(trial(0.345, 0.5, seed).decision == "keep" for seed in range(20))
    assert sum(trial(0.345, 0.32, seed).decision == "rollback" for seed in range(20)) <= 1


def test_draft_lengths_may_differ_between_the_versions() -> None:
    """K = 1 accepts fewer tokens than K = 3 did, and that is no regression; at the same K it is."""
    before = known(0.6, 1)
    for now, decision in ((0.6, "keep"), (0.2, "rollback")):
        probation = Probation(before, 0.95)
        for _, verdict in zip(range(LONG_ENOUGH), verdicts(now, 2, draft_lengths=(1, 2)), strict=False):
            probation.observe(*verdict)
        assert probation.decision == decision


def test_little_known_of_the_older_version_convicts_nobody() -> None:
    assert trial(0.345, 0.2, 0, count=8).decision == "keep"


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=500),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=500),
    st.sampled_from([0.5, 0.95, 0.999]),
)
def test_any_verdicts_give_finite_evidence_that_never_falls_below_zero(
    before: list[tuple[int, int]], now: list[tuple[int, int]], confidence: float
) -> None:
    acceptance = Acceptance(3)
    for verdict in before:
        acceptance.observe(*verdict)
    means = acceptance.accepted(2.0)
    assert all(0 <= low <= mean <= k for k, (low, mean) in enumerate(zip(means, acceptance.accepted(), strict=True)))
    probation = Probation(acceptance, confidence)
    for verdict in now:
        probation.observe(*verdict)
        assert 0 <= probation.evidence < 1e6
    assert probation.drafts <= PROBATION_DRAFTS


def feed(rollout: Rollout, version: int, previous: int, chance: float, count: int, seed: int = 0) -> None:
    for _, verdict in zip(range(count), verdicts(chance, seed), strict=False):
        rollout.observe(version, previous, *verdict)


def test_versions_come_and_one_goes() -> None:
    rollout = Rollout(3, 0.95)
    assert (rollout.decision, rollout.version) == ("undecided", 0)
    feed(rollout, 2, 1, 0.345, 300)
    assert rollout.decision == "keep" and "no verdicts of a version before it" in rollout.reason  # K was 0 with 1
    feed(rollout, 3, 2, 0.0, 30)
    assert rollout.decision == "undecided" and rollout.looks_worse
    assert "version 3 is on probation against version 2" in rollout.reason
    feed(rollout, 3, 2, 0.0, 170)
    assert (rollout.decision, rollout.version) == ("rollback", 3) and not rollout.looks_worse
    assert "version 3 is worse than version 2 at confidence 0.95: acceptance length 1.00, 1.44 before" in rollout.reason
    feed(rollout, 2, 3, 0.345, 100)  # it came back, and is judged by nobody
    assert (rollout.decision, rollout.version) == ("rollback", 3)
    feed(rollout, 4, 2, 0.345, PROBATION_DRAFTS)  # judged by the version that stayed, not by the one that went
    assert (rollout.decision, rollout.version) == ("keep", 4)
    assert "not found worse than version 2" in rollout.reason


def test_it_can_be_switched_off() -> None:
    rollout = Rollout(3, 0.0)
    feed(rollout, 2, 1, 0.345, 300)
    feed(rollout, 3, 2, 0.0, 300)
    assert rollout.decision == "keep" and "switched off" in rollout.reason
