"""The CPU budget on clocks that a test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner.budget import LONGEST_SLEEP_S, CpuBudget, DeviceClock


class Clocks:
    def __init__(self) -> None:
        self.cpu = self.wall = 0.0


@given(
    st.floats(0.05, 1.0),
    st.lists(st.tuples(st.floats(0.001, 0.3), st.floats(0.0, 0.5)), min_size=1, max_size=50),
)
def test_never_more_than_the_share(share: float, work: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    budget = CpuBudget(share, lambda: clocks.cpu, lambda: clocks.wall)
    for step, (used, waited) in enumerate(work, start=1):
        clocks.cpu += used
        clocks.wall += used + waited
        pause = budget.debt(step)
        assert pause >= 0
        clocks.wall += pause
        if pause == LONGEST_SLEEP_S:  # the piece of work was too long to be rested from in one sleep
            return
        assert clocks.cpu <= clocks.wall * share + 1e-6


def test_waiting_counts_as_rest() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.5, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu, clocks.wall = 1.0, 2.0  # one second of work took two: half a CPU
    assert budget.debt(1) == 0.0
    clocks.cpu, clocks.wall = 2.0, 3.0
    assert budget.debt(2) == 1.0


def test_a_learner_that_yields_takes_a_part_of_its_share() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.5, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 1.0
    assert budget.debt(1, factor=0.5) == 3.0


def test_nothing_served_nothing_to_step_back_for() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.25, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 1.0
    assert budget.debt(7) == 3.0  # the engine made steps meanwhile
    clocks.cpu, clocks.wall = 2.0, 5.0
    assert budget.debt(7) == 0.0  # it made none
    clocks.cpu, clocks.wall = 3.0, 6.0
    assert budget.debt(8) == 3.0


def test_on_a_gpu_time_counts_until_the_device_is_done() -> None:
    clocks = Clocks()

    def device_catches_up() -> None:
        clocks.wall += 0.3

    def work() -> bool:
        clocks.wall += 0.1
        return True

    clock = DeviceClock(device_catches_up, lambda: clocks.wall)
    budget = CpuBudget(0.25, clock, lambda: clocks.wall)
    assert clock.run(work)
    assert clock() == pytest.approx(0.4)
    pause = budget.debt(1)
    assert pause == pytest.approx(1.2)  # 0.4 of 1.6 seconds
    clocks.wall += pause
    assert clock() == pytest.approx(0.4)  # a rest is not counted
