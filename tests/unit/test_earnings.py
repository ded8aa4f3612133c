"""What the learner may take, by the time that speculation saves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.earnings import ADVANCE_S, EVERY_S, MEMORY_S, SPENT, Earnings
from aurora_vllm.control.step_costs import STEPS_TO_KNOW
from aurora_vllm.spec_decode import steps_in_flight
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from tests.unit.tiny_world import World, session


def after(steps: list[tuple[float, float]], share: float = 0.1, least: float = 0.03) -> Earnings:
    """These steps (seconds, seconds saved) over and over, for long enough to be all that is remembered."""
    earnings = Earnings(share, least, resting=0.001)
    for _ in range(round(12 * MEMORY_S / sum(seconds for seconds, _ in steps))):
        for step in steps:
            earnings.observe(*step)
    return earnings


@given(st.floats(-0.5, 3.0), st.floats(0.01, 1.0), st.floats(0.001, 1.0))
def test_it_takes_a_part_of_what_is_saved_within_its_bounds(saved: float, share: float, least: float) -> None:
    taken = after([(0.05, 0.05 * saved)], share, least).factor * share
    assert 0 < taken <= share * (1 + 1e-9)
    assert taken >= min(least, share) * (1 - 1e-9)
    if min(least, share) * 1.01 < taken < share * 0.99:
        assert taken == pytest.approx(SPENT * saved, rel=1e-2)


def test_all_time_counts_and_steps_that_lost_too() -> None:
    assert after([(0.05, 0.05)]).saved == pytest.approx(1.0, abs=0.01)
    assert after([(0.05, 0.05), (0.15, 0.0)]).saved == pytest.approx(0.25, abs=0.01)
    assert after([(0.05, 0.05), (0.15, -0.05)]).saved == pytest.approx(0.0, abs=0.01)


def test_it_decides_every_second_of_steps() -> None:
    earnings = Earnings(0.1, 0.03, 0.001)
    assert sum(earnings.observe(EVERY_S / 4, 0.0) for _ in range(40)) == 10


def test_it_says_what_it_takes_and_why() -> None:
    assert after([(0.1, 0.0)]).reason == "0.030 of a CPU, its least share: speculation saves 0.00 s a second"
    assert "speculation loses 0.30 s a second" in after([(0.1, -0.03)]).reason
    middle = after([(0.1, 0.02)]).reason
    assert middle == "0.050 of a CPU, a quarter of what is saved: speculation saves 0.20 s a second"
    assert after([(0.1, 0.06)]).reason == "0.100 of a CPU, all of its share: speculation saves 0.60 s a second"


def proposed(drafted: int, copied: int, used_s: float, saved: float = 0.4) -> Earnings:
    """Every step saves ``saved`` of its time, with so many accepted tokens of the draft, and copied."""
    earnings = Earnings(share=0.1, least=0.02, resting=0.002, advance_s=60.0, used_s=used_s)
    for _ in range(2400):
        earnings.accepted(drafted, copied=False)
        earnings.accepted(copied, copied=True)
        earnings.observe(0.05, 0.05 * saved)
    return earnings


@given(st.integers(0, 8), st.integers(0, 8), st.floats(0.0, 2.0))
def test_after_the_advance_it_lives_on_what_its_draft_saves(drafted: int, copied: int, saved: float) -> None:
    before, after = (proposed(drafted, copied, used, saved) for used in (59.0, 61.0))
    assert before.earned == before.saved == pytest.approx(saved, rel=1e-2, abs=1e-3)
    part = drafted / (drafted + copied) if copied else 1.0
    assert after.earned == pytest.approx(part * saved, rel=1e-2, abs=1e-3)
    assert after.factor <= before.factor


def test_there_is_no_advance_where_even_a_good_draft_would_not_pay() -> None:
    earning, idle = proposed(drafted=1, copied=3, used_s=0.0), proposed(drafted=0, copied=3, used_s=0.0)
    earning.could_pay = idle.could_pay = False
    assert earning.earned == pytest.approx(earning.saved / 4) and earning.factor == pytest.approx(0.25, rel=1e-2)
    assert idle.factor == pytest.approx(0.02)
    why = "as even a good draft would not pay: of 0.40 s a second, its draft saves 0.00"
    assert idle.reason == f"0.002 of a CPU, {why}"


def test_where_copies_save_everything_the_least_share_is_left() -> None:
    assert proposed(drafted=0, copied=2, used_s=59.0).factor == 1.0
    assert proposed(drafted=0, copied=2, used_s=60.0).factor == pytest.approx(0.2)
    assert proposed(drafted=2, copied=0, used_s=60.0).factor == 1.0


def test_the_newest_tokens_decide_whose_savings_they_are() -> None:
    earnings = proposed(drafted=0, copied=2, used_s=60.0)
    for _ in range(400):
        earnings.accepted(2, copied=False)
        earnings.observe(0.05, 0.02)
    assert earnings.factor > 0.8


def test_it_says_whose_savings_count() -> None:
    reasons = [proposed(1, 3, 0.0).reason, proposed(1, 3, 60.0).reason, proposed(0, 3, 60.0).reason]
    assert reasons == [
        "0.100 of a CPU, all of its share: speculation saves 0.40 s a second",
        "0.025 of a CPU, a quarter of what its draft saves: of 0.40 s a second, its draft saves 0.10",
        "0.020 of a CPU, its least share: of 0.40 s a second, its draft saves 0.00",
    ]


@pytest.mark.parametrize(
    ("speculate", "accepts", "factor"),
    [("auto", True, 1.0), ("auto", False, 0.4), ("always", True, 1.0), ("never", False, 1.0)],
)
def test_the_learner_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speculate: Literal["auto", "always", "never"], accepts: bool,
    factor: float,
) -> None:  # fmt: skip
    """Where K is fixed, or only captured, what speculation gains is no reason to learn or not to."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(steps_in_flight.time, "perf_counter", lambda: clock.now)

    def step(tokens: int, drafts: int) -> SimpleNamespace:
        return SimpleNamespace(
            num_scheduled_tokens={"a": tokens + drafts},
            scheduled_spec_decode_tokens={"a": [7] * drafts} if drafts else {},
            num_spec_tokens_to_schedule=0,
            finished_req_ids=set(),
        )

    shares = {"learner_cpu_share": 0.05, "learner_least_share": 0.02}
    with session(World(), tmp_path, speculate=speculate, **shares) as (current, _):
        advisor = SpeculationAdvisor(current, 2)

        def run(done: SimpleNamespace, sampled: list[int], seconds: float) -> None:
            advisor.step_starts()
            advisor.draft_length(1)
            clock.now += seconds
            advisor.step_ends(done, [sampled])

        for _ in range(2 * STEPS_TO_KNOW):  # what plain decoding takes
            run(step(1, 0), [1], EVERY_S)
        for _ in range(round(2 * MEMORY_S)):  # a prompt's steps count as well
            run(step(1, 2), [7, 7, 1] if accepts else [1], EVERY_S)
            run(step(300, 0), [1], EVERY_S)
        assert advisor._control.scheduler.learner_share == pytest.approx(factor)
        earned = advisor._control.scheduler.learner_earnings
        assert ("speculation saves" in earned) == (speculate == "auto" and accepts)


@pytest.mark.parametrize(("version", "factor"), [(None, 0.4), (1, 1.0)])
def test_the_learner_does_not_live_on_copies_for_ever(tmp_path: Path, version: int | None, factor: float) -> None:
    with session(World(), tmp_path, learner_cpu_share=0.05, learner_least_share=0.02) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        advisor._control.learner.cpu_seconds = ADVANCE_S
        for _ in range(100):
            advisor._take_verdicts(version, {(2, 2): 1})
            advisor._learner_share.earned(EVERY_S, EVERY_S / 2, could_pay=True)
        assert advisor._control.scheduler.learner_share == pytest.approx(factor)
