"""Replay: its byte budget, who goes first, and what is forgotten, against a list that keeps the same books."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner.replay import RECENT_AT_LEAST, Replay
from aurora_vllm.learner.trajectory import Branch, Trajectory

ROW = 8 + 4 * (3 + 1)  # bytes of a row: the token id, and states of one float32 each


def trajectory(rows: int, branch_rows: int = 0) -> Trajectory:
    states = torch.zeros(max(rows, branch_rows), 4)
    branch = Branch(1, 0, torch.zeros(branch_rows, dtype=torch.int64), states[:branch_rows])
    return Trajectory(
        request=0,
        start=0,
        token_ids=torch.zeros(rows, dtype=torch.int64),
        aux=states[:rows, :3],
        last=states[:rows, :1],
        prompt_length=1,
        draft_version=1,
        temperature=0.0,
        branches=[branch] if branch_rows else [],
    )


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), st.integers(0, 3)),
        st.tuples(st.just("sample"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.integers(1, 3)),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(
    budget=st.integers(1, 40), operations=OPERATIONS, recent=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 9)
)
def test_any_history_keeps_the_books(
    budget: int, operations: list[tuple[str, int, int]], recent: float, seed: int
) -> None:
    replay = Replay(budget * ROW, recent, seed)
    held: list[Trajectory] = []  # oldest first
    uses: dict[int, int] = {}
    added: list[Trajectory] = []  # keeps every one alive: an id is that of one trajectory only
    evicted, missed = 0, 0.0

    def leaves(one: Trajectory) -> float:
        return max(0, 2 - uses[id(one)]) * len(one.token_ids)

    for what, number, more in operations:
        if what == "add":
            new = trajectory(number, more)
            added.append(new)
            fits = number + more <= budget
            assert replay.add(new, due=2.0) == fits
            if fits:
                held.append(new)
                uses[id(new)] = 0
                while sum(one.nbytes for one in held) > budget * ROW:  # the oldest go, and no more than must
                    missed += leaves(held.pop(0))
                    evicted += 1
        elif what == "sample":
            fresh = [one for one in reversed(held) if uses[id(one)] == 0]
            chosen = replay.sample(number)
            assert_a_sample(chosen, held, fresh, number)
            for one in chosen:
                uses[id(one)] += 1
        else:
            gone = held[number : number + more]
            replay.remove([*gone, trajectory(1)])  # one that is not there is no matter
            missed += sum(leaves(one) for one in gone)
            held = [one for one in held if not any(one is other for other in gone)]
        assert len(replay) == len(held)
        assert replay.nbytes == sum(one.nbytes for one in held) <= budget * ROW
        assert replay.tokens == sum(len(one.token_ids) for one in held)
        assert (replay.evicted, replay.missed) == (evicted, missed)
        assert replay.mean_uses() * len(held) == pytest.approx(sum(uses[id(one)] for one in held))
    assert {id(one) for one in replay.sample(10**9)} == {id(one) for one in held}


def assert_a_sample(chosen: list[Trajectory], held: list[Trajectory], fresh: list[Trajectory], tokens: int) -> None:
    assert bool(chosen) == bool(held)
    assert len({id(one) for one in chosen}) == len(chosen)
    assert all(any(one is other for other in held) for one in chosen)
    assert sum(len(one.token_ids) for one in chosen) <= tokens or len(chosen) == 1
    # What was never handed out comes first, newest before older; nothing else before all of it.
    n = min(len(fresh), len(chosen))
    assert all(one is other for one, other in zip(chosen[:n], fresh, strict=False))


def test_one_that_is_over_the_budget_alone_pushes_nothing_out() -> None:
    replay = Replay(10 * ROW)
    small = trajectory(4)
    assert replay.add(small) and not replay.add(trajectory(8, branch_rows=3))  # a branch counts
    assert replay.sample(1) == [small] and replay.evicted == 0
    assert replay.add(trajectory(8, branch_rows=2)) and replay.evicted == 1


def test_what_was_not_due_becomes_so_newest_first() -> None:
    replay = Replay(100 * ROW)
    for due in (3.0, 0.0, 0.0, 0.0, 3.0):
        replay.add(trajectory(4), due)
    assert replay.make_due(9, 2.0) == 2 * 2 * 4  # the newest is due already, the third of them is begun
    assert replay.make_due(9, 2.0) == 0
    replay.sample(4)
    replay.remove(one.trajectory for one in list(replay._window))
    assert replay.missed == 3 * 4 + 0 + 2 * 2 * 4 + (3 - 1) * 4


def test_equal_is_not_the_same() -> None:
    replay = Replay(100 * ROW)
    one, twin = trajectory(4), trajectory(4)
    replay.add(one), replay.add(twin)
    replay.remove([one])
    assert [other is twin for other in replay.sample(100)] == [True]


@pytest.mark.parametrize("recent", [0.0, 1.0])
def test_repeated_samples_come_from_the_recent_past_or_from_all_of_it(recent: float) -> None:
    replay = Replay(1000 * ROW, recent)
    held = [trajectory(1) for _ in range(4 * RECENT_AT_LEAST + 8)]
    for one in held:
        replay.add(one)
    assert len(replay.sample(len(held))) == len(held)  # all were handed out once
    drawn = {id(replay.sample(1)[0]) for _ in range(600)}
    newest = {id(one) for one in held[-len(held) // 4 :]}
    assert drawn == (newest if recent else {id(one) for one in held})


def test_draws_are_the_seeds() -> None:
    def draws(seed: int) -> list[int]:
        replay = Replay(1000 * ROW, seed=seed)
        held = [trajectory(n) for n in range(1, 20)]
        for one in held:
            replay.add(one)
        return [len(one.token_ids) for _ in range(40) for one in replay.sample(1)]

    assert draws(1) == draws(1) != draws(2)
