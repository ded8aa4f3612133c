"""The curriculum: lessons in time, gradient steps after them, and what each leaves to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner import curriculum as module
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.loss import LossOutput
from aurora_vllm.learner.replay import Replay
from aurora_vllm.learner.trajectory import Trajectory
from tests.unit.test_lesson import acceptance, day0_draft, linear_world


@pytest.fixture
def small_lessons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LESSON_ROWS", (300, 900))
    monkeypatch.setattr(module, "LESSON_REQUESTS", 12)


def settings(**changes: object) -> AuroraConfig:
    return AuroraConfig(**({"vocabulary_coverage": 0.0, "replay_passes": 1.0, "ttt_length": 2} | changes))  # type: ignore[arg-type]


def do_all(curriculum: Curriculum) -> list[str]:
    done = []
    while what := curriculum.next():
        curriculum.work()
        done.append(what)
    return done


def test_lessons_come_when_enough_was_seen_and_steps_wait_for_the_first(small_lessons: None, tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    norm, fc = draft.norm.weight.detach().clone(), draft.fc.weight.detach().clone()
    traffic = linear_world(head, norm, 40, 30)
    done: list[tuple[int, str]] = []
    for i, one in enumerate(traffic):
        assert not curriculum.add(one)
        done += [(i, what) for what in do_all(curriculum)]
    assert {what for i, what in done if i < 11} == set()  # too few requests
    assert next(i for i, what in done if what == "first lesson") == 11
    assert {i for i, what in done if what == "lesson"} == {29}  # 30 requests of 30 rows
    assert min(i for i, what in done if what == "training") == 11
    assert not torch.equal(draft.fc.weight, fc) and curriculum.trainer.refining_since is not None
    assert curriculum.tokens_trained >= curriculum.tokens_seen == 40 * 30
    unseen = linear_world(head, norm, 8, 30, seed=77)
    assert acceptance(draft, head, unseen) > 1.8


def test_a_lesson_after_other_weights_took_its_draft_is_as_good_as_any(small_lessons: None, tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    norm, day0 = draft.norm.weight.detach().clone(), copy.deepcopy(draft.state_dict())
    seen: list[str] = []
    for one in linear_world(head, norm, 40, 30):
        curriculum.add(one)
        while what := curriculum.next():
            if curriculum.work() and what == "first lesson":
                draft.load_state_dict(day0)
                curriculum.go_on()
            seen.append(what)
    assert "lesson" in seen
    assert acceptance(draft, head, linear_world(head, norm, 8, 30, seed=77)) > 1.8


def test_the_last_lesson_is_what_the_replay_holds(small_lessons: None, tmp_path: Path) -> None:
    """A learner that waited for more would never be done with its lessons, and never sleep."""
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    traffic = linear_world(head, draft.norm.weight.detach().clone(), 40, 30)
    curriculum.replay = Replay(20 * traffic[0].nbytes)  # 600 rows
    done: list[tuple[int, str]] = []
    for i, one in enumerate(traffic):
        curriculum.add(one)
        done += [(i, what) for what in do_all(curriculum)]
    assert {i for i, what in done if what == "lesson"} == {20}
    assert not curriculum.has_lessons_to_learn


def test_a_lesson_that_fails_is_passed_over(
    small_lessons: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    assert curriculum.teacher is not None
    learn, begun = curriculum.teacher.run, []

    def fail_once(trajectories: list[Trajectory]) -> Iterator[None]:
        begun.append(len(trajectories))
        yield
        if len(begun) == 1:
            raise torch.linalg.LinAlgError("not positive-definite")
        yield from learn(trajectories)

    monkeypatch.setattr(curriculum.teacher, "run", fail_once)
    fc, faults = draft.fc.weight.detach().clone(), []
    for i, one in enumerate(linear_world(head, draft.norm.weight.detach().clone(), 40, 30)):
        curriculum.add(one)
        while what := curriculum.next():
            is_another = curriculum.work()
            assert not (what == "first lesson" and is_another)
            if curriculum.fault:
                faults.append((i, curriculum.fault))
                assert torch.equal(draft.fc.weight, fc) and curriculum.next() == "training"
                assert curriculum.trainer.refining_since is None
    assert begun == [12, 30]  # not the same again
    assert faults == [(11, "LinAlgError in a lesson: learning goes on without it")]
    assert curriculum.trainer.refining_since is not None and not curriculum.has_lessons_to_learn


def test_a_lesson_from_nothing_is_none(small_lessons: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_LESSON_ROWS", 20)  # less than the newest trajectory has
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    for one in linear_world(head, draft.norm.weight.detach().clone(), 12, 30):
        curriculum.add(one)
    assert curriculum.next() == "first lesson"
    assert not curriculum.work()
    assert "nothing to learn" in curriculum.fault and curriculum.trainer.refining_since is None
    assert curriculum.next() == "training"


def test_a_replay_too_small_for_a_lessons_requests_gives_one_all_the_same(small_lessons: None, tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(), tmp_path, worth_keeping=False)
    traffic = linear_world(head, draft.norm.weight.detach().clone(), 6, 60)
    curriculum.replay = Replay(4 * traffic[0].nbytes)
    done: list[tuple[int, str]] = []
    for i, one in enumerate(traffic):
        curriculum.add(one)
        done += [(i, what) for what in do_all(curriculum)]
    assert {i for i, what in done if what == "first lesson"} == {4}  # the first was pushed out
    assert "training" in {what for _, what in done}


def test_a_trained_draft_gets_no_lesson_and_gentle_steps(small_lessons: None, tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(batch_tokens=30), tmp_path, worth_keeping=True)
    body = draft.fc.weight.detach().clone()
    for one in linear_world(head, draft.norm.weight.detach().clone(), 20, 30):
        curriculum.add(one)
        assert set(do_all(curriculum)) == {"training"}
    assert torch.equal(draft.fc.weight, body)  # the first steps train lm_head alone
    assert curriculum.trainer.steps > 0


@pytest.mark.parametrize("how", [Curriculum.refine, Curriculum.go_on])
def test_training_goes_on_from_weights_that_were_put_in_the_candidates_place(
    tmp_path: Path, how: Callable[[Curriculum], None]
) -> None:
    """A draft from disk, or the version before a rollback: the draft in training, of which it is the average, too."""
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(batch_tokens=30), tmp_path, worth_keeping=True)
    for one in linear_world(head, draft.norm.weight.detach().clone(), 4, 30):
        curriculum.add(one)
    do_all(curriculum)
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in draft.state_dict().items()}
    draft.load_state_dict(other)
    how(curriculum)
    assert curriculum.trainer.draft is not draft
    for trained in (draft.state_dict(), curriculum.trainer.draft.state_dict()):
        assert all(torch.equal(trained[name], tensor) for name, tensor in other.items())


def test_steps_stop_after_the_passes_they_were_given(tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(replay_passes=3.0, batch_tokens=30), tmp_path, worth_keeping=True)
    for one in linear_world(head, draft.norm.weight.detach().clone(), 4, 30):
        curriculum.add(one)
    assert len(do_all(curriculum)) == 3 * 4 and curriculum.next() == ""
    assert curriculum.replay.mean_uses() == 3.0


def small_replay(tmp_path: Path, held: int, passes: float) -> tuple[Curriculum, list[Trajectory]]:
    """A curriculum whose replay holds so many requests, and twenty times as many."""
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(replay_passes=passes, batch_tokens=60), tmp_path, worth_keeping=True)
    traffic = linear_world(head, draft.norm.weight.detach().clone(), 20 * held, 30)
    curriculum.replay = Replay(held * traffic[0].nbytes)
    stub = LossOutput(*[torch.zeros(1)] * 6)
    curriculum.trainer.step = lambda batch: stub  # type: ignore[method-assign]
    return curriculum, traffic


def test_what_was_pushed_out_is_owed_no_more(tmp_path: Path) -> None:
    curriculum, traffic = small_replay(tmp_path, 5, 3.0)
    for i, one in enumerate(traffic):
        curriculum.add(one, owed=i < 60)  # asleep from then on
        if i % 10 == 0:
            curriculum.work()  # a busy day
        if i == 59:
            busy = curriculum.tokens_trained
            assert 0 < curriculum._owed <= 3 * curriculum.replay.tokens
    assert curriculum.next() == "" and curriculum.tokens_trained <= busy + 2 * 60
    curriculum.owe(70)  # it wakes
    before = curriculum.tokens_trained
    do_all(curriculum)
    assert curriculum.tokens_trained - before in (3 * 90, 3 * 90 + 30)


def test_who_keeps_up_gives_all_passes_though_the_replay_is_small(tmp_path: Path) -> None:
    curriculum, traffic = small_replay(tmp_path, 5, 3.0)
    for one in traffic:
        curriculum.add(one)
        do_all(curriculum)
    assert 0 <= curriculum.tokens_trained - 3 * curriculum.tokens_seen < 60


def test_a_batch_without_a_row_to_learn_from_moves_nothing(tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(batch_tokens=30), tmp_path, worth_keeping=True)
    one, two = linear_world(head, draft.norm.weight.detach().clone(), 2, 30)
    curriculum.add(one)
    do_all(curriculum)
    assert curriculum.loss > 0 and not torch.equal(curriculum.trainer.draft.lm_head.weight, draft.lm_head.weight)
    before, loss = draft.lm_head.weight.detach().clone(), curriculum.loss
    curriculum.replay.remove([one])
    curriculum.add(replace(two, prompt_length=40))
    assert do_all(curriculum) == ["training"] and curriculum.trainer.empty == 1
    assert torch.equal(draft.lm_head.weight, before) and curriculum.loss == loss
