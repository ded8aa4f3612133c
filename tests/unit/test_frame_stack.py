"""Calls at the edge of a chunk of CPython's frame stack, with and without room for them."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from aurora_vllm.spec_decode.frame_stack import SLOTS, with_room, with_roomy_steps

CALLS, DEEPEST = 200, 400


def leaf(_: int) -> None:
    pass


def faults_of_calls() -> int:
    """Minor page faults of many calls, each of which returns before the next."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(CALLS):
        leaf(i)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def at_depth(depth: int, function: Callable[[], int]) -> int:
    return at_depth(depth - 1, function) if depth else function()


def test_some_depth_is_at_the_edge_and_room_makes_every_depth_the_same() -> None:
    unlucky = [depth for depth in range(DEEPEST) if at_depth(depth, faults_of_calls) >= CALLS]
    if not unlucky:
        pytest.skip("this Python keeps its frames otherwise")
    roomy = with_room(faults_of_calls)
    assert max(at_depth(depth, roomy) for depth in range(DEEPEST)) < CALLS / 10


def test_arguments_results_and_errors_pass() -> None:
    @with_room
    def divide(a: int, *, by: int) -> float:
        """Halves, for example."""
        return a / by

    assert divide(3, by=2) == 1.5 and divide.__doc__ == "Halves, for example."
    with pytest.raises(ZeroDivisionError):
        divide(3, by=0)
    with pytest.raises(TypeError):
        divide(3, 2)  # type: ignore[misc]


def test_both_calls_of_a_step_have_room_in_the_subclass_only() -> None:
    class Worker:
        def execute_model(self, batch: int) -> int:
            return batch

        def sample_tokens(self, batch: int) -> int:
            return -batch

    @with_roomy_steps
    class Ours(Worker):
        def execute_model(self, batch: int) -> int:
            return super().execute_model(batch) + 1

    assert (Ours().execute_model(5), Ours().sample_tokens(5)) == (6, -5)
    for name in ("execute_model", "sample_tokens"):
        sizes = [getattr(one, name).__code__.co_stacksize for one in (Ours, Worker)]
        assert sizes[0] == SLOTS and sizes[1] < 100
