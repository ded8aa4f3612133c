"""What the learner may take, by the time that speculation saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.earnings import EVERY_S, MEMORY_S, SPENT, Earnings
from aurora_vllm.control.profit import Decision
from aurora_vllm.spec_decode import advisor as advisor_module
from aurora_vllm.spec_decode.advisor import DraftLengthAdvisor
from tests.unit.tiny_world import World, session


def after(steps: list[tuple[float, float]], share: float = 0.1, least: float = 0.03) -> Earnings:
    """These steps (seconds, gain) over and over, for long enough to be all that is remembered."""
    earnings = Earnings(share, least)
    for _ in range(round(12 * MEMORY_S / sum(seconds for seconds, _ in steps))):
        for step in steps:
            earnings.observe(*step)
    return earnings


@settings(deadline=None)
@given(st.floats(0.5, 4.0), st.floats(0.01, 1.0), st.floats(0.001, 1.0))
def test_it_takes_a_part_of_what_is_saved_within_its_bounds(gain: float, share: float, least: float) -> None:
    taken = after([(0.5, gain)], share, least).factor * share
    assert 0 < taken <= share * (1 + 1e-9)
    assert taken >= min(least, share) * (1 - 1e-9)
    if min(least, share) * 1.001 < taken < share * 0.999:
        assert taken == pytest.approx(SPENT * (gain - 1.0), rel=1e-3)


def test_prompts_save_nothing_and_their_time_counts() -> None:
    assert after([(0.05, 2.0)]).saved == pytest.approx(1.0, abs=0.01)
    assert after([(0.05, 2.0), (0.15, 1.0)]).saved == pytest.approx(0.25, abs=0.01)


def test_it_says_what_it_takes_and_why() -> None:
    assert after([(0.1, 1.0)]).reason == "0.030 of a CPU, its least share: speculation saves 0.00 s a second"
    middle = after([(0.1, 1.2)]).reason
    assert middle == "0.050 of a CPU, a quarter of what is saved: speculation saves 0.20 s a second"
    assert after([(0.1, 1.6)]).reason == "0.100 of a CPU, all of its share: speculation saves 0.60 s a second"


@pytest.mark.parametrize(
    ("speculate", "decodes", "factor"),
    [("auto", True, 1.0), ("auto", False, 0.4), ("always", True, 1.0), ("never", False, 1.0)],
)
def test_the_learner_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speculate: Literal["auto", "always", "never"], decodes: bool,
    factor: float,
) -> None:  # fmt: skip
    """Where K is fixed, or only captured, what speculation gains is no reason to learn or not to."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(advisor_module.time, "perf_counter", lambda: clock.now)
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1 if decodes else 300},
        scheduled_spec_decode_tokens={},
        num_spec_tokens_to_schedule=0,
        finished_req_ids=set(),
    )
    shares = {"learner_cpu_share": 0.05, "learner_least_share": 0.02}
    with session(World(), tmp_path, speculate=speculate, **shares) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        saving: Callable[[int], Decision] = lambda _: Decision(0, "copying pays", gain=1.8)  # noqa: E731
        monkeypatch.setattr(advisor._controller, "decide", saving)
        for _ in range(round(4 * MEMORY_S)):
            advisor.step_starts()
            advisor.draft_length(1)
            clock.now += EVERY_S
            advisor.step_ends(step, [[1]])
        assert advisor._control.scheduler.learner_share == pytest.approx(factor)
        assert ("saves" in advisor._control.scheduler.learner_earnings) == (speculate == "auto")
