"""What the learner may take, by what speculation gains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.control.earnings import EVERY, MEMORY, SPENT, Earnings
from aurora_vllm.spec_decode.advisor import DraftLengthAdvisor
from tests.unit.tiny_world import World, session


def after(gain: float, share: float = 0.1, least: float = 0.03) -> Earnings:
    earnings = Earnings(share, least)
    for _ in range(round(20 * MEMORY)):
        earnings.observe(gain)
    return earnings


@given(st.floats(0.5, 4.0), st.floats(0.01, 1.0), st.floats(0.001, 1.0))
def test_it_takes_a_part_of_the_gain_within_its_bounds(gain: float, share: float, least: float) -> None:
    taken = after(gain, share, least).factor * share
    assert 0 < taken <= share * (1 + 1e-9)
    assert taken >= min(least, share) * (1 - 1e-9)
    if min(least, share) < taken < share * 0.999:
        assert taken == pytest.approx(SPENT * (gain - 1.0), rel=1e-3)


def test_it_says_what_it_takes_and_why() -> None:
    assert after(1.0).reason == "0.030 of a CPU, its least share: speculation gains 1.00x"
    assert after(1.2).reason == "0.050 of a CPU, a quarter of what speculation gains (1.20x)"
    assert after(1.6).reason == "0.100 of a CPU, all of its share: speculation gains 1.60x"


@pytest.mark.parametrize(("speculate", "factor"), [("auto", 0.3), ("always", 1.0), ("never", 1.0)])
def test_the_learner_is_told(tmp_path: Path, speculate: Literal["auto", "always", "never"], factor: float) -> None:
    """Where K is fixed, or only captured, what speculation gains is no reason to learn or not to."""
    with session(World(), tmp_path, speculate=speculate) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        for _ in range(EVERY):
            advisor.draft_length(1)
        assert advisor._control.scheduler.learner_share == pytest.approx(factor)
        assert ("least share" in advisor._control.scheduler.learner_earnings) == (speculate == "auto")
