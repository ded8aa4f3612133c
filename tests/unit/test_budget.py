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
    """Also where a piece of work takes several sleeps to rest from."""
    clocks, step = Clocks(), 0
    budget = CpuBudget(share, lambda: clocks.cpu, lambda: clocks.wall)
    for used, waited in work:
        clocks.cpu += used
        clocks.wall += used + waited
        while True:
            step += 1
            pause = budget.debt(step)
            assert 0 <= pause <= LONGEST_SLEEP_S
            clocks.wall += pause
            if not budget.owes_more:
                break
        assert clocks.cpu <= clocks.wall * share + 1e-6


def test_what_is_owed_is_forgiven_where_nothing_is_served() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.05, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 10.0
    assert budget.debt(1) == LONGEST_SLEEP_S and budget.owes_more
    clocks.wall += LONGEST_SLEEP_S
    assert budget.debt(1) == 0.0 and not budget.owes_more


def test_waiting_counts_as_rest() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.5, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu, clocks.wall = 1.0, 2.0  # one second of work took two: half a CPU
    assert budget.debt(1) == 0.0
    clocks.cpu, clocks.wall = 2.0, 3.0
    assert budget.debt(2) == 1.0


@pytest.mark.parametrize("is_served", [True, False])
def test_time_in_which_it_was_stopped_is_no_rest(is_served: bool) -> None:
    clocks = Clocks()
    budget = CpuBudget(0.5, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 1.5
    assert budget.debt(1) == pytest.approx(1.5)
    clocks.wall += 100.0
    budget.continues()
    assert budget.debt(1 + is_served) == pytest.approx(1.5)
    clocks.wall += 1.0
    assert budget.debt(2 + is_served) == pytest.approx(0.5)


def test_a_learner_that_yields_takes_a_part_of_its_share() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.5, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 1.0
    assert budget.debt(1, factor=0.5) == LONGEST_SLEEP_S and budget.owes_more
    clocks.wall += 2.0
    assert budget.debt(2, factor=0.5) == 1.0 and not budget.owes_more


def test_nothing_served_nothing_to_step_back_for() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.25, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 1.0
    assert budget.debt(7) == 2.0  # the engine made steps meanwhile
    clocks.cpu, clocks.wall = 2.0, 5.0
    assert budget.debt(7) == 0.0  # it made none
    clocks.cpu, clocks.wall = 3.0, 6.0
    assert budget.debt(8) == 2.0


def test_a_step_that_takes_long_is_no_idle_server() -> None:
    clocks = Clocks()
    budget = CpuBudget(0.25, lambda: clocks.cpu, lambda: clocks.wall)
    clocks.cpu = clocks.wall = 0.5
    assert budget.debt(7) == 1.5
    clocks.cpu, clocks.wall = 0.75, 2.0  # 1.75 s, and the step is still under way
    assert budget.debt(7, in_flight=1) == 1.0
    assert budget.debt(7) == 0.0


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


def test_what_needs_no_gpu_is_not_counted() -> None:
    clocks = Clocks()
    clock = DeviceClock(lambda: None, lambda: clocks.wall)

    def work() -> bool:
        clocks.wall += 0.1
        with clock.on_host():
            clocks.wall += 60.0
        return True

    for turn in (1, 2):
        clock.run(work)
        assert clock() == pytest.approx(turn * 0.1)
