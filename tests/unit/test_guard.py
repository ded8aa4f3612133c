"""The learner's share under the guard, on simulated machines."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control import guard
from aurora_vllm.control.guard import FLOOR, LONGEST_WINDOW, WINDOW, LearnerGuard, relative_times
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from tests.unit.tiny_world import World, session


def serve(
    one: LearnerGuard, steps: int, typical: float, tail: float = 0.0, duty: float = 0.15, seed: int = 0
) -> list[float]:
    """A machine on which a step beside the learner takes 1 + typical of one without, and one in six of those 1 + tail.

    The learner works in ``duty`` of the steps at its full share. Batch size and draft length change, and the machine
    slows down and recovers for reasons of its own. Returns the share after each decision.
    """
    rng, shares = random.Random(seed), []
    for step in range(steps):
        batch, k = rng.choice([(1, 0), (1, 3), (4, 1)])
        working = rng.random() < duty * one.share
        seconds = 0.05 * (1 + 0.2 * k + 0.3 * batch) * rng.uniform(0.95, 1.05) * (1.3 if step // 64 % 3 == 0 else 1.0)
        if working:
            seconds *= 1 + (tail if rng.random() < 1 / 6 else typical)
        if one.observe(batch, k, seconds, working):
            shares.append(one.share)
    return shares


def test_a_learner_that_costs_little_keeps_its_share() -> None:
    one = LearnerGuard(0.05)
    assert set(serve(one, 20 * WINDOW, typical=0.1)) == {1.0}
    assert 0.0 <= one.slowdown < 0.05
    assert one.reason.startswith("1.00 of its share: learning adds ") and "5.0% are allowed" in one.reason


@pytest.mark.parametrize(("typical", "tail"), [(1.0, 1.0), (0.0, 4.0)])  # slowed all over, or in the tail alone
def test_one_that_costs_much_yields_until_it_costs_what_it_may(typical: float, tail: float) -> None:
    one = LearnerGuard(0.05)
    shares = serve(one, 40 * WINDOW, typical, tail)
    assert min(shares) < 0.6
    before = shares[-1]
    shares = serve(one, 60 * WINDOW, typical=0.02, tail=0.02, seed=1)  # the slowdown is gone
    assert shares[0] <= max(before * 1.25, FLOOR) and shares[-1] == 1.0  # restored, and slowly


def test_it_does_not_starve_and_is_restored_from_the_floor() -> None:
    one = LearnerGuard(0.01)
    assert serve(one, 60 * WINDOW, typical=3.0)[-1] == FLOOR
    assert serve(one, 10 * LONGEST_WINDOW, typical=0.0)[-1] == 1.0


def test_what_slows_both_is_not_the_learners_fault() -> None:
    shares = serve(LearnerGuard(0.02), 30 * WINDOW, typical=0.0)
    assert shares and set(shares) == {1.0}


def test_one_that_never_rests_cannot_be_judged() -> None:
    one = LearnerGuard(0.05, share=0.5)
    assert serve(one, 2 * LONGEST_WINDOW, typical=3.0, duty=3.0) and one.share == 0.5
    assert "hardly rests" in one.reason


def test_one_that_sleeps_gets_its_share_back() -> None:
    one = LearnerGuard(0.05, share=0.5)
    serve(one, 5 * LONGEST_WINDOW, typical=0.0, duty=0.0)
    assert one.share == 1.0 and "hardly works" in one.reason


@settings(max_examples=30)
@given(st.floats(0.01, 0.2), st.floats(0, 5), st.floats(0, 5), st.floats(0.02, 1), st.integers(0, 99))
def test_the_share_stays_within_its_bounds(limit: float, typical: float, tail: float, duty: float, seed: int) -> None:
    one = LearnerGuard(limit)
    assert all(FLOOR <= share <= 1.0 for share in serve(one, 6 * WINDOW, typical, tail, duty, seed))


def test_kinds_of_step_are_not_mixed() -> None:
    steps = [(1, 0, 1.0, False)] * 20 + [(4, 0, 4.0, False)] * 20 + [(4, 0, 4.4, True)] * 5 + [(8, 0, 9.0, True)]
    resting, working = relative_times(steps)
    assert resting == [1.0] * 40 and working == pytest.approx([1.1] * 5)  # of batch 8 nothing is known without


def test_the_scheduler_measures_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora_vllm.spec_decode import steps_in_flight

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(steps_in_flight.time, "perf_counter", lambda: clock.now)
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1},
        scheduled_spec_decode_tokens={},
        num_spec_tokens_to_schedule=0,
        finished_req_ids=set(),
    )
    prompt = SimpleNamespace(**(vars(step) | {"num_scheduled_tokens": {"a": 9}}))

    def run(limit: float) -> SpeculationAdvisor:
        with session(World(), tmp_path, learner_slowdown=limit, speculate="never") as (current, _):
            advisor = SpeculationAdvisor(current, 2)
            control = advisor._control
            control.learner.pid = control.server.learner_pid = 7
            assert control.scheduler.learner_share == 1.0
            for i in range(2 * guard.WINDOW):
                working = i % 5 == 0
                advisor.draft_length(1)
                control.learner.working = working
                advisor.step_starts()
                clock.now += 0.15 if working else 0.1
                control.learner.working = False  # it ended within the step
                advisor.step_ends(prompt if i % 7 == 0 else step, [[1]])
            found.update(control.snapshot()["scheduler"])
            return advisor

    found: dict[str, object] = {}
    run(0.05)
    assert found["learner_share"] == 0.5 and found["learner_slowdown"] == pytest.approx(0.1, abs=0.02)
    assert str(found["learner_guard"]).startswith("0.50 of its share: learning adds 10")
    run(0.0)
    assert found["learner_share"] == 1.0 and found["learner_guard"] == "off by the settings"
