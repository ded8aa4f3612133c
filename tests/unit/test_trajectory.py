"""Rows to trajectories: against the known truth of random histories, and case by case what must be refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aurora_vllm.learner.assembler import MIN_ROWS, Assembler
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.transport.rows import RowFlag
from tests.unit.engine_history import LAYOUT, Request, Row, engine, new_request, pack, payload, row


def check(trajectory: Trajectory, truth: Request, start: int, end: int, next_may_be_unseen: bool = False) -> None:
    """Everything in a trajectory is what the engine computed."""
    number, tokens = truth.number, truth.tokens
    next_token = tokens[end] if end < len(tokens) and end >= truth.prompt_length else -1
    assert trajectory.start == start
    assert trajectory.token_ids.tolist() == tokens[start:end]
    assert trajectory.next_token == next_token or (next_may_be_unseen and trajectory.next_token == -1)
    assert trajectory.prompt_length == truth.prompt_length and trajectory.temperature == 0.7
    rows = payload(number, torch.arange(start, end), torch.tensor(tokens[start:end]))
    assert torch.equal(trajectory.aux, rows[:, :6]) and torch.equal(trajectory.last, rows[:, 6:])
    for branch in trajectory.branches:
        positions = torch.arange(branch.position, branch.position + len(branch.token_ids))
        values = payload(number, positions, branch.token_ids)
        assert torch.equal(branch.last, values[:, 6:])
        assert branch.token_ids[0] != tokens[branch.position]
        assert start < branch.position <= end  # its parent is a row of this piece


def feed_in_slices(assembler: Assembler, rows: list[Row], rng: random.Random) -> list[Trajectory]:
    cuts = sorted({0, len(rows), *(rng.randrange(len(rows) + 1) for _ in range(rng.randrange(20)))})
    return [one for a, b in pairwise(cuts) for one in assembler.feed(pack(rows[a:b]))]


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), steps=st.integers(1, 60))
def test_any_history_gives_its_truth(seed: int, count: int, steps: int) -> None:
    rng = random.Random(seed)
    requests = [new_request(rng.getrandbits(62), rng) for _ in range(count)]
    rows: list[Row] = []
    ended: list[Request] = []
    dropped = 0
    for request, new, what in engine(requests, rng, steps):
        rows += new
        if what == "end" and request.path_end > request.start:
            ended.append(request)
        dropped += what == "dropped" and request.path_end > request.start
    assembler = Assembler(LAYOUT)
    done = feed_in_slices(assembler, rows, rng)

    expected = [one for one in ended if one.path_end - one.start >= MIN_ROWS]
    assert [one.request for one in done] == [one.number for one in expected]
    for trajectory, truth in zip(done, expected, strict=True):
        check(trajectory, truth, truth.start, truth.path_end)
        assert [(b.position, b.accepted, b.token_ids.tolist()) for b in trajectory.branches] == truth.branches
    assert assembler.discarded["dropped by the worker"] == dropped
    assert assembler.discarded["too short"] == len(ended) - len(expected)
    open_now = [one for one in requests if not one.ended and one.path_end > one.start]
    assert len(assembler._open) == len(open_now)
    held = sum(one.path_end - one.start + sum(len(b[2]) for b in one.branches) for one in open_now)
    assert assembler.open_bytes == held * LAYOUT.row_bytes


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), skipped=st.integers(1, 60))
@example(seed=21632, skipped=46)
def test_a_learner_that_starts_in_the_middle_never_makes_up_a_path(seed: int, skipped: int) -> None:
    rng = random.Random(seed)
    requests = [new_request(rng.getrandbits(62), rng) for _ in range(4)]
    rows = [r for _, new, _ in engine(requests, rng, 60) for r in new]
    by_number = {one.number: one for one in requests}
    assembler = Assembler(LAYOUT)
    for trajectory in feed_in_slices(assembler, rows[skipped:], rng):
        truth = by_number[trajectory.request]
        assert trajectory.start < truth.prompt_length
        # Rows sent again after a preemption end at a chunk, and a chunk says nothing of the token behind it.
        check(trajectory, truth, trajectory.start, trajectory.start + len(trajectory.token_ids), True)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), max_tokens=st.integers(MIN_ROWS, 20))
def test_long_requests_are_cut_into_pieces(seed: int, max_tokens: int) -> None:
    rng = random.Random(seed)
    request = new_request(7, rng)
    rows = [r for step in range(1, 40) for r in _maybe_preempted(request, step, rng)]
    rows.append(request.end(41))
    done = feed_in_slices(Assembler(LAYOUT, max_tokens=max_tokens), rows, rng)
    position = request.start
    for trajectory in done:
        assert len(trajectory.token_ids) <= max_tokens
        check(trajectory, request, position, position + len(trajectory.token_ids))
        position += len(trajectory.token_ids)
    assert request.path_end - position < MIN_ROWS


def _maybe_preempted(request: Request, step: int, rng: random.Random) -> list[Row]:
    if rng.random() < 0.1:
        request.preempt()
    return request.step(step)


def simple(positions: range, tokens: list[int] | None = None, prompt_length: int = 4) -> list[Row]:
    return [
        row(5, p, p if tokens is None else tokens[i], 1, prompt_length=prompt_length) for i, p in enumerate(positions)
    ]


END = row(5, 0, 0, 9, RowFlag.END)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([*simple(range(6)), *simple(range(7, 12))], "gap"),
        (simple(range(4, 12)), "beginning missed"),
        ([*simple(range(6)), *simple(range(2, 8), [2, 3, 40, 5, 6, 7])], "rows contradict each other"),
        (
            [*simple(range(5)), row(5, 5, 5, 2, prompt_length=4, emitted=40), *simple(range(6, 9))],
            "rows contradict each other",
        ),
        (simple(range(MIN_ROWS - 1)), "too short"),
    ],
)
def test_what_cannot_be_trusted_is_discarded_and_counted_once(rows: list[Row], reason: str) -> None:
    assembler = Assembler(LAYOUT)
    assert assembler.feed(pack([*rows, *simple(range(20, 24)), END])) == [] or reason not in ("gap", "beginning missed")
    assembler = Assembler(LAYOUT)
    assert assembler.feed(pack([*rows, END])) == []
    assert assembler.discarded == {reason: 1}
    assert assembler.open_bytes == len(assembler._open) == 0
    assert len(assembler.feed(pack([*simple(range(6)), END]))) == 1  # the number may be used again after its end


def test_bounds_on_what_is_open() -> None:
    by_count = Assembler(LAYOUT, max_open=3)
    for number in range(10):
        by_count.feed(pack([row(number, 0, 1, 1, prompt_length=4)]))
        by_count.feed(pack([row(0, by_count_position(number), 1, 1, prompt_length=40)]))  # request 0 stays in use
    assert len(by_count._open) == 3 and by_count.discarded == {"too much open at once": 7}
    assert by_count.feed(pack([row(9, 1, 1, 2, prompt_length=4)])) == []

    by_bytes = Assembler(LAYOUT, max_open_bytes=10 * LAYOUT.row_bytes)
    for number in range(20):
        by_bytes.feed(pack([row(number, p, 1, 1, prompt_length=4) for p in range(3)]))
        assert by_bytes.open_bytes <= 10 * LAYOUT.row_bytes
    assert len(by_bytes._open) == 3


def by_count_position(number: int) -> int:
    return number + 1 if number else 1


def test_a_branch_whose_parent_went_with_the_piece_before_is_left_out() -> None:
    assembler = Assembler(LAYOUT, max_tokens=6)
    rejected = [row(5, p, 90, 2, RowFlag.REJECTED, prompt_length=4) for p in (6, 7)]
    (first,) = assembler.feed(pack([*simple(range(6)), *rejected]))
    (second,) = assembler.feed(pack([*simple(range(6, 11)), row(5, 11, 91, 3, RowFlag.REJECTED, prompt_length=4), END]))
    assert (first.branches, second.start) == ([], 6)
    assert [branch.position for branch in second.branches] == [11] and assembler.open_bytes == 0


def test_requests_whose_end_never_comes_are_not_remembered_for_ever() -> None:
    """As after a worker that died: their numbers do not come again."""
    assembler = Assembler(LAYOUT, max_open=2)
    for number in range(50):
        assembler.feed(pack([row(number, 9, 1, 1, prompt_length=4)]))  # its beginning was missed
    assert assembler.discarded == {"beginning missed": 50}
    assert list(assembler._given_up) == list(range(42, 50))  # four times what may be open, the newest


def test_trajectory_sizes() -> None:
    (trajectory,) = Assembler(LAYOUT).feed(
        pack([*simple(range(6)), row(5, 6, 9, 1, RowFlag.REJECTED, prompt_length=4), END])
    )
    assert trajectory.response_tokens == 2
    # Of a rejected row the target's last state is kept, of the path's all states.
    assert trajectory.nbytes == 6 * (8 + LAYOUT.payload_bytes) + 8 + 2 * 4


@pytest.mark.parametrize("states", [LAYOUT.aux, LAYOUT.last])
def test_states_that_are_not_finite_make_no_trajectory(states: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rows = pack([*simple(range(8)), END])
    states(rows)[5, 1] = torch.nan
    assembler = Assembler(LAYOUT)
    assert assembler.feed(rows) == [] and assembler.discarded == {"not finite": 1}


def test_rejected_rows_are_kept_only_where_they_are_wanted() -> None:
    rows = [*simple(range(6)), row(5, 6, 9, 1, RowFlag.REJECTED, prompt_length=4)]
    for wanted in (True, False):
        assembler = Assembler(LAYOUT, branches=wanted)
        assembler.feed(pack(rows))
        assert assembler.open_bytes == (7 if wanted else 6) * LAYOUT.row_bytes
        (trajectory,) = assembler.feed(pack([END]))
        assert len(trajectory.branches) == int(wanted) and assembler.open_bytes == 0
