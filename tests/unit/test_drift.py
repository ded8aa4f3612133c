"""When to sleep and when to wake, on simulated traffic."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.drift import (
    COVERAGE_DROP,
    LEAST_SPREAD,
    MEANINGFUL,
    TRIAL_EVIDENCE,
    TRIAL_STEPS,
    TRY_AGAIN_TOKENS,
    WATCH_EVERY,
    AcceptanceWatch,
    Trial,
)

POSITIONS = 3


class Traffic:
    """Requests whose drafts are accepted with a chance that differs from one to the next."""

    def __init__(self, seed: int, chance: float, differs: float = 0.1) -> None:
        self._random = random.Random(seed)
        self.chance, self._differs = chance, differs

    def request(self, verifications: int = 50) -> tuple[int, int]:
        """Verifications and accepted drafts."""
        chance = min(max(self._random.gauss(self.chance, self._differs), 0.02), 0.98)
        accepted = 0
        for _ in range(verifications):
            run = 0
            while run < POSITIONS and self._random.random() < chance:
                run += 1
            accepted += run
        return verifications, accepted


def watch(traffic: Traffic, requests: int = 30) -> AcceptanceWatch:
    usual = [accepted / steps for steps, accepted in (traffic.request() for _ in range(requests))]
    return AcceptanceWatch(usual, coverage=0.97, tokens=0)


def observations_until_awake(one: AcceptanceWatch, traffic: Traffic, limit: int) -> int | None:
    return next((i for i in range(1, limit + 1) if one.observe(*traffic.request())), None)


def test_a_drop_is_found_soon_and_nothing_is_seen_where_nothing_is() -> None:
    waits, wrong = [], 0
    for seed in range(40):
        traffic = Traffic(seed, 0.6)
        one = watch(traffic)
        wrong += observations_until_awake(one, traffic, 200) is not None
        one = watch(traffic)
        traffic.chance = 0.4
        waits.append(observations_until_awake(one, traffic, 200))
    assert wrong <= 4
    found = sorted(wait for wait in waits if wait is not None)
    assert len(found) >= 38 and found[len(found) // 2] <= 12


def test_a_rise_is_no_reason_to_wake() -> None:
    traffic = Traffic(1, 0.5)
    one = watch(traffic)
    traffic.chance = 0.8
    assert observations_until_awake(one, traffic, 100) is None


def test_the_words_hold_both_lengths() -> None:
    one = AcceptanceWatch([1.5] * 20, 0.9, 0)
    said = [one.observe(50, 25) for _ in range(10)]
    assert "woke: acceptance length fell from 2.50 to 1.50" in said


def test_short_requests_make_one_observation_together() -> None:
    one = AcceptanceWatch([1.5] * 20, 0.9, 0)
    assert not any(one.observe(4, 0) for _ in range(9))  # 36 verifications
    assert one.observe(4, 0)  # 40, none accepted: 15 spreads below


def test_one_in_a_few_is_looked_at_and_the_one_after_a_bad_one() -> None:
    one = AcceptanceWatch([1.5] * 20, 0.9, 0)

    def looked_at(accepted: int) -> list[bool]:
        due = []
        for _ in range(WATCH_EVERY):
            due.append(one.next_is_due())
            if due[-1]:
                one.observe(50, accepted)
        return due

    assert looked_at(75) == [True] + [False] * (WATCH_EVERY - 1)
    low = int(50 * (1.5 - 1.1 * LEAST_SPREAD))
    assert looked_at(low) == [True] * WATCH_EVERY


def test_traffic_that_leaves_the_vocabulary_wakes_and_so_does_time() -> None:
    one = AcceptanceWatch([1.0], 0.97, 1000)
    assert not one.traffic(0.97 - 0.9 * COVERAGE_DROP, 1000 + TRY_AGAIN_TOKENS - 1)
    assert one.traffic(0.91, 1000) == "woke: the draft vocabulary covers 0.91 of the traffic, it was 0.97"
    assert one.traffic(1.0, 1000 + TRY_AGAIN_TOKENS) == f"woke: to try again after {TRY_AGAIN_TOKENS} tokens"


def test_without_anything_usual_it_does_not_fail() -> None:
    one = AcceptanceWatch([], 0.0, 0)
    assert not any(one.observe(50, 0) for _ in range(50))


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(1.0, 3.0), st.floats(-0.5, 0.5))
def test_a_trial_wants_training_first_then_evidence_then_a_gain(
    steps: int, evidence: int, length: float, gain: float
) -> None:
    trial = Trial(steps, evidence)
    assert not trial.is_judged(steps + TRIAL_STEPS - 1) and trial.is_judged(steps + TRIAL_STEPS)
    assert trial.reason(steps + 10) == f"awake: on trial, 10 of {TRIAL_STEPS} steps trained"
    verifications = 1000
    then = (verifications, round(verifications * (length - 1)))
    now = (verifications, max(0, round(verifications * (length - 1 + gain))))
    needed = TRIAL_EVIDENCE * evidence
    while trial.tokens < needed:
        assert trial.decision == "undecided"
        trial.observe(then, now)
    assert trial.gain == pytest.approx((now[1] - then[1]) / verifications)
    assert trial.decision == ("goes on" if trial.gain >= MEANINGFUL else "sleeps")
    assert trial.reason(steps + TRIAL_STEPS + 7).startswith("awake" if trial.decision == "goes on" else "sleeps")


def test_river_is_loaded_by_those_who_sleep_alone() -> None:
    code = "import sys, aurora_vllm.control.drift; sys.exit('river' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
