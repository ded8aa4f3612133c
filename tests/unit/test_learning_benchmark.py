"""The learning benchmark: its arithmetic, and that a replay scores before it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.spec_decode.prompt_lookup import KINDS, EarlierAnswers
from benchmarks.copies import Walk, simulate_with_copies
from benchmarks.learning import DRAFT_LENGTH, WINDOW, Run, learn, summary
from benchmarks.learning_arms import ARMS, RELEASE_BATCH, Arm, arm_names
from tests.unit.tiny_world import LAYOUT, World


def run(accepted: list[int], steps: int = 10, tokens: int = 100, unseen: float = 1.0) -> Run:
    """A run of trajectories with as many verifications each."""
    count = len(accepted)
    return Run([tokens * i for i in range(count)], [0.5 * i for i in range(count)], [steps] * count, accepted, unseen)


def test_the_running_mean_weighs_verifications() -> None:
    one = Run([0, 5], [0.0, 1.0], [10, 30], [0, 30])
    assert one.running() == [1.0, 1.75]


def test_what_lies_behind_the_window_is_forgotten() -> None:
    assert run([10] * 3 + [0] * WINDOW).running()[-1] == 1.0
    assert run([10] * 3 + [0] * (WINDOW - 1)).running()[-1] == pytest.approx(1 + 10 / (10 * WINDOW))


def test_the_goal_is_reached_where_the_mean_first_is_there() -> None:
    one = run([0, 0, 5, 15, 20, 0])
    assert one.running()[:5] == [1.0, 1.0, pytest.approx(1 + 5 / 30), 1.5, 1.8]
    assert one.tokens_to(1.5) == 300
    assert one.tokens_to(1.9) is None


def test_an_arm_that_never_gets_there_counts_with_the_length_of_its_run() -> None:
    good, bad = [run([5] * 4, unseen=u) for u in (1.5, 2.0, 1.0)], [run([1] * 4)] * 3
    good[0] = run([0, 5, 20, 5], unseen=1.5)  # 1.83 only at its third
    figures, spread = summary({"ours": good, "release": bad}, rows=400)
    assert figures["tokens_to_1_5_ours"] == 0 and spread["tokens_to_1_5_ours"] == [0, 0, 100, 200]
    assert figures["tokens_to_1_5_release"] == 400 and figures["reached_1_5_release"] == 0
    assert figures["tokens_to_1_5_ratio"] == 400  # nothing is divided by zero tokens
    assert figures["acceptance_length_unseen"] == 1.5


def test_arms_by_name() -> None:
    assert arm_names("") == list(ARMS)
    assert {"ours", "discard_0.1_3", "discard_1_8"} <= set(arm_names("ours,discard"))
    with pytest.raises(typer.BadParameter, match="no arm nonsense"):
        arm_names("ours, nonsense")


def test_a_replay_scores_what_it_has_not_trained_on_and_leaves_the_draft_alone(tmp_path: Path) -> None:
    world = World()
    target, draft = world.save_target(tmp_path), world.draft()
    head = load_target_head(target)
    assembler = Assembler(LAYOUT)
    trajectories = [one for i in range(30) for one in assembler.feed(world.rows(i, answer=24))]
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    ticks: Iterator[int] = iter(range(10_000))
    arm = Arm("quick", {"learning_rate": 1e-2, "replay_passes": 20.0, "ttt_length": 3})
    found = learn(arm, 0, trajectories[:24], trajectories[24:], draft, head, target, clock=lambda: next(ticks))

    assert all(torch.equal(tensor, draft.state_dict()[name]) for name, tensor in before.items())
    first = simulate(draft, head, trajectories[0], DRAFT_LENGTH)
    assert (found.steps[0], found.accepted[0], found.tokens[0]) == (first.steps, sum(first.accepted), 0)
    assert found.tokens == [28 * i for i in range(24)]
    assert found.seconds == [float(i) for i in range(24)]  # one tick of the clock a trajectory: scoring is not counted
    waits = learn(
        Arm("batches", arm.settings, batch_sequences=RELEASE_BATCH),
        0,
        trajectories[:9],
        trajectories[24:],
        draft,
        head,
        target,
    )
    alone = [simulate(draft, head, one, DRAFT_LENGTH) for one in trajectories[:9]]
    assert waits.accepted[:8] == [sum(one.accepted) for one in alone[:8]]  # nothing is learned before a batch is whole


def test_copies_are_walked_as_a_server_would() -> None:
    """A phrase of five tokens three times; the draft is right about one token of every step."""
    text, drafted, none = [*range(10, 15)] * 3, [1] * 8, EarlierAnswers(100)
    of_two = KINDS.number(2, from_others=False, is_sampled=False)
    alone = Walk(3, none, always=True)
    alone.answer(text, 5, drafted)
    # nothing to copy before the phrase begins again with one token; then every step gains four
    assert alone.score == Score(3, (2, 2, 2))
    chosen = Walk(3, none, always=False)
    chosen.answer(text, 5, drafted)
    assert chosen.score == Score(3, (3, 2, 2)) and chosen._copies.preferred(of_two)
    wrong = Walk(3, none, always=False)
    for _ in range(9):
        wrong._copies.compare(of_two, False, True)
    wrong.answer(text[:10], 5, [1] * 3)
    assert wrong.score == Score(2, (2, 0, 0))  # copies have been wrong


def test_what_was_answered_before_is_copied_too() -> None:
    answers = EarlierAnswers(100)
    answers.add(list(range(20, 32)))
    walk = Walk(3, answers, always=True)
    walk.answer([1, 2, 20, 21, 22, 23, 24, 25, 26, 27], 4, [0] * 6)
    assert walk.score == Score(2, (2, 2, 1))  # 22, 23, 24 after 20, 21; then 26, 27 and the answer ends


def test_without_anything_to_copy_it_is_the_draft_alone(tmp_path: Path) -> None:
    world = World()
    draft, head = world.draft(), load_target_head(world.save_target(tmp_path))
    (one,) = Assembler(LAYOUT).feed(world.rows(3, answer=24))
    one = replace(one, token_ids=torch.arange(len(one.token_ids)))
    served, copied = simulate_with_copies(draft, head, [], [one], DRAFT_LENGTH)
    assert served == simulate(draft, head, one, DRAFT_LENGTH) and served.steps > 10
    assert copied.acceptance_length == 1.0
