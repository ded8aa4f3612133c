"""The curriculum: lessons in time, gradient steps after them, and what each leaves to the next."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner import curriculum as module
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.replay import Replay
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
                curriculum.go_on(day0)
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


def test_a_trained_draft_gets_no_lesson_and_gentle_steps(small_lessons: None, tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(batch_tokens=30), tmp_path, worth_keeping=True)
    body = draft.fc.weight.detach().clone()
    for one in linear_world(head, draft.norm.weight.detach().clone(), 20, 30):
        curriculum.add(one)
        assert set(do_all(curriculum)) == {"training"}
    assert torch.equal(draft.fc.weight, body)  # the first steps train lm_head alone
    assert curriculum.trainer.steps > 0


def test_steps_stop_after_the_passes_they_were_given(tmp_path: Path) -> None:
    draft, head = day0_draft()
    curriculum = Curriculum(draft, head, settings(replay_passes=3.0, batch_tokens=30), tmp_path, worth_keeping=True)
    for one in linear_world(head, draft.norm.weight.detach().clone(), 4, 30):
        curriculum.add(one)
    assert len(do_all(curriculum)) == 3 * 4 and curriculum.next() == ""
    assert curriculum.replay.mean_uses() == 3.0
