"""Prompts: real, reproducible, and no problem on both sides of the split."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from demo.workload import TASKS, Prompt, humaneval, load, split


def test_humaneval_is_all_there_in_every_wording() -> None:
    problems = humaneval()
    assert len(problems) == 164
    assert all(len({prompt.text for prompt in wordings}) == len(TASKS) for wordings in problems)
    assert "def has_close_elements(" in problems[0][0].text


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(0, 2**32))
def test_no_problem_is_both_learned_and_unseen(wordings: list[int], seed: int) -> None:
    problems = [[Prompt(f"p{i}", f"{i} {w}") for w in range(count)] for i, count in enumerate(wordings)]
    workload = split(problems, seed)
    learned, unseen = ({prompt.problem for prompt in part} for part in (workload.learn, workload.unseen))
    assert not learned & unseen
    everything = sorted(prompt.text for prompt in workload.learn + workload.unseen)
    assert everything == sorted(prompt.text for wordings in problems for prompt in wordings)


def test_the_seed_orders_and_does_not_choose() -> None:
    one, same, other = load(seed=1), load(seed=1), load(seed=2)
    assert one == same
    assert one.learn != other.learn
    assert {p.problem for p in one.unseen} == {p.problem for p in other.unseen}


def test_a_problem_comes_back_only_after_all_others() -> None:
    learn = load(seed=3).learn
    first_round = [prompt.problem for prompt in learn[: len(learn) // len(TASKS)]]
    assert len(set(first_round)) == len(first_round) == 123


def test_requests_are_greedy() -> None:
    body = load().learn[0].body("m", 7)
    assert body["temperature"] == 0.0
    assert body["max_tokens"] == 7
