"""What a learner takes up again after a crash or a restart, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.learner import curriculum
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.checkpoints import Checkpoint, newest
from aurora_vllm.learner.draft import save_draft
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.publish import publish
from aurora_vllm.learner.resume import is_taught
from aurora_vllm.session import ENVIRONMENT_KEY
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment
from tests.unit.tiny_world import DRAFT, H, World, assert_same, send, serve, session, trajectory, weights

pytestmark = pytest.mark.usefixtures("same_every_time")


def learned(world: World, tmp_path: Path, requests: int = 8, **settings: Any) -> tuple[Path, Learner]:
    """A run that ends, and what it left on disk."""
    with session(world, tmp_path, checkpoint_dir=tmp_path / "kept", **settings) as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(requests))
        learner.keeper.save(at_once=True)
        learner.keeper.save(at_once=True)  # nothing was learned in between
        found = newest(tmp_path / "kept")
        assert found is not None and found.name == "checkpoint-000001"
        assert learner.control.learner.checkpoint == found.name
        assert learner.control.learner.checkpoints == 1
        return found, learner


@pytest.mark.parametrize("sync", ["evidence", "steps"])
def test_a_new_server_goes_on_from_a_checkpoint(tmp_path: Path, sync: str) -> None:
    world = World()
    kept, before = learned(world, tmp_path, sync=sync, sync_interval=6)
    with session(world, tmp_path, draft=kept, resume=kept, sync=sync) as (shared, producer):
        after = Learner(shared)
        assert after.control.learner.checkpoint == f"goes on from {kept.name}, step {before.curriculum.trainer.steps}"
        now, then = after.drafts, before.drafts
        assert now.version == 1
        assert_same(weights(now.incumbent), weights(then.incumbent))  # what vLLM loads from there, too
        for candidate in (now.candidate, after.curriculum.trainer.draft):
            assert_same(weights(candidate), weights(then.candidate))
        assert torch.equal(after.curriculum.coverage.counts, before.curriculum.coverage.counts)
        assert after.control.learner.shadow_accepted_per_position[:2] == pytest.approx(then.shadow.per_position())
        # From the candidate, which is an average, the optimizer goes on exactly: the same step gives the same weights.
        before.curriculum.go_on()
        forgetful = Learner(shared)  # a check of the check: without its moments the step is another
        forgetful.curriculum.trainer.optimizer.state.clear()
        batch = collate([trajectory(world)])
        exact, same, other = (one.curriculum.trainer for one in (before, after, forgetful))
        for trainer in (exact, same, other):
            trainer.step(batch)
        assert same.steps == exact.steps
        assert_same(weights(same.draft), weights(exact.draft))
        assert not torch.equal(same.draft.fc.weight, now.candidate.fc.weight)  # it was a step
        assert not torch.equal(other.draft.fc.weight, exact.draft.fc.weight)
        serve(world, after, producer, range(3))
        assert after.curriculum.trainer.steps > before.curriculum.trainer.steps


def test_a_learner_after_a_crash_takes_up_its_predecessors_training(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, checkpoint_dir=tmp_path / "kept", evidence_tokens=10**6) as (shared, producer):
        first = Learner(shared)
        serve(world, first, producer, range(5))
        first.keeper.save(at_once=True)
        second, shared_block = Learner(shared), first.control.learner
        assert second.drafts.version == 1 and second.curriculum.trainer.steps == first.curriculum.trainer.steps > 0
        assert_same(weights(second.drafts.candidate), weights(first.drafts.candidate))
        counted = shared_block.steps_taken
        assert counted == first.curriculum.trainer.steps
        serve(world, second, producer, range(5, 7))
        gained = second.curriculum.trainer.steps - first.curriculum.trainer.steps
        assert shared_block.steps_taken == counted + gained > counted  # a counter: it never falls
        second.sync = type(second.sync)("steps", 1)
        second.publisher.publish_if_due()
        assert second.bank.published() == 2
        third = Learner(shared)  # what was saved is of version 1: older than what is served
        assert third.drafts.version == 2 and third.curriculum.trainer.steps == 0
        assert_same(weights(third.drafts.candidate), weights(third.drafts.incumbent))


def test_a_lesson_that_was_not_yet_published_founds_its_lineage_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    with session(world, tmp_path, checkpoint_dir=tmp_path / "kept", sync="steps", sync_interval=10**6) as (shared, _):
        first = Learner(shared)
        with monkeypatch.context() as patched:
            patched.setattr(first.curriculum, "work", lambda: True)
            first._work()
        first.keeper.save(at_once=True)
        second = Learner(shared)
        second.sync = type(second.sync)("steps", 0)
        second.publisher.publish_if_due()
        assert second.bank.read(2).lineage == 2


def test_a_lesson_that_was_learned_is_kept_and_not_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = day0_world(tmp_path, monkeypatch)
    where: dict[str, Any] = {"draft": tmp_path / "day0", "checkpoint_dir": tmp_path / "kept"}
    with session(world, tmp_path, evidence_tokens=10**6, **where) as (shared, producer):
        first = Learner(shared)
        assert first.curriculum.awaits_first_lesson
        for request in range(6):
            send(producer, world.rows(request))
        while first.curriculum.awaits_first_lesson:
            assert first.turn()
        assert first.curriculum.trainer.steps == 0  # the lesson alone is worth a checkpoint
        first.keeper.save(at_once=True)
        second = Learner(shared)
        assert_same(weights(second.drafts.candidate), weights(first.drafts.candidate))
        assert not second.curriculum.awaits_first_lesson and second.drafts.candidate_is_ahead
        serve(world, second, producer, range(6, 12))
        assert second.curriculum.trainer.steps > 0
        now, then = second.drafts.candidate, first.drafts.candidate
        assert torch.equal(now.fc.weight, then.fc.weight)  # refined: first lm_head alone
        assert not torch.equal(now.lm_head.weight, then.lm_head.weight)


def day0_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """With a draft as day 0 makes it, that is to have lessons soon."""
    monkeypatch.setitem(DRAFT, "num_key_value_heads", 2)
    monkeypatch.setattr(curriculum, "LESSON_ROWS", (60, 10**6))
    monkeypatch.setattr(curriculum, "LESSON_REQUESTS", 3)
    world = World()
    day0 = world.draft()
    with torch.no_grad():
        day0.fc.weight.zero_()[:, -H:] = torch.eye(H)
    save_draft(day0, tmp_path / "day0", DRAFT)
    return world


def test_what_was_saved_before_the_first_lesson_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = day0_world(tmp_path, monkeypatch)
    where: dict[str, Any] = {"draft": tmp_path / "day0", "checkpoint_dir": tmp_path / "kept"}
    with session(world, tmp_path, **where) as (shared, producer):
        first = Learner(shared)
        serve(world, first, producer, range(2))
        first.drafts.candidate_changed()  # as where another vocabulary was chosen
        first.keeper.save(at_once=True)
    kept = newest(tmp_path / "kept")
    assert kept is not None
    with session(world, tmp_path, **(where | {"draft": kept}), resume=kept) as (shared, producer):
        second = Learner(shared)
        assert second.control.learner.checkpoint.startswith("goes on from")
        assert second.curriculum.awaits_first_lesson
        for request in range(6):
            send(producer, world.rows(request))
        while second.curriculum.awaits_first_lesson:
            assert second.turn()
        assert second.curriculum.trainer.refining_since == 0
        second.keeper.save(at_once=True)
    taught = newest(tmp_path / "kept")
    assert taught is not None and taught != kept
    with session(world, tmp_path, draft=taught, resume=taught) as (shared, _):
        assert not Learner(shared).curriculum.has_lessons_to_learn


def test_only_a_draft_that_nobody_trained_is_given_lessons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin from day 0, and would overwrite what it was taught; that it looks like day 0's says nothing."""
    world = day0_world(tmp_path, monkeypatch)
    with session(world, tmp_path, draft=tmp_path / "day0") as (shared, _):
        assert Learner(shared).curriculum.has_lessons_to_learn
        config = shared.config.model_copy(update={"draft": tmp_path / "day0"})  # the user's own
        assert not Learner(shared.model_copy(update={"config": config})).curriculum.has_lessons_to_learn
        learner = Learner(shared)
        publish(learner.bank, 2, learner.drafts.candidate, {})
        assert not Learner(shared).curriculum.has_lessons_to_learn  # as after a crash


def test_a_checkpoint_that_cannot_be_read_may_have_learned_anything(tmp_path: Path) -> None:
    assert is_taught(tmp_path) and not is_taught(None)
    world = World()
    kept, _ = learned(world, tmp_path)
    assert is_taught(kept)
    damage_facts(kept)
    assert is_taught(kept)


def test_counters_go_on_over_several_runs(tmp_path: Path) -> None:
    world = World()
    kept, _ = learned(world, tmp_path, requests=4)
    for run in range(2, 4):
        with session(world, tmp_path, draft=kept, resume=kept, checkpoint_dir=tmp_path / "kept") as (shared, producer):
            learner = Learner(shared)
            serve(world, learner, producer, range(4))
            learner.keeper.save(at_once=True)
            found = newest(tmp_path / "kept")
            assert found is not None
            kept = found
        statistics = Checkpoint.read(kept).facts["statistics"]
        assert statistics["tokens_seen"] == run * 4 * 20
        assert statistics["steps"] >= run * 4 - 1
        assert statistics["replay"]["trajectories"] == 4  # the traffic of earlier runs is gone


def test_a_checkpoint_that_is_not_due_is_not_written(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, checkpoint_dir=tmp_path / "kept", checkpoint_interval_s=3600) as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(3))
        learner.keeper.save()
        assert not (tmp_path / "kept").exists()
        learner.keeper._saved_at -= 3600
        learner.keeper.save()
        assert newest(tmp_path / "kept") is not None


def test_where_nothing_can_be_written_learning_goes_on(tmp_path: Path, capfd: Any) -> None:
    world = World()
    (tmp_path / "file").write_text("")
    with session(world, tmp_path, checkpoint_dir=tmp_path / "file") as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(3))
        learner.keeper.save(at_once=True)
        assert learner.control.learner.checkpoint.startswith("not saved: ")
        serve(world, learner, producer, range(3, 6))
        learner.keeper.save(at_once=True)
        assert (learner.control.learner.checkpoints, learner.control.learner.checkpoint_failures) == (0, 2)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "no checkpoint could be saved" in line]
    assert said.startswith("WARNING")


def damage_tensors(kept: Path) -> None:
    file = kept / "learner" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def damage_facts(kept: Path) -> None:
    (kept / "learner" / "state.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_tensors, damage_facts])
def test_training_state_that_is_damaged_costs_only_itself(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    world = World()
    kept, before = learned(world, tmp_path)
    damage(kept)
    with session(world, tmp_path, draft=kept, resume=kept) as (shared, producer):
        learner = Learner(shared)
        assert "training starts anew" in learner.control.learner.checkpoint
        assert_same(weights(learner.drafts.candidate), weights(before.drafts.incumbent))
        assert learner.curriculum.trainer.steps == 0
        serve(world, learner, producer, range(3))


def test_nothing_of_the_traffic_is_in_a_checkpoint(tmp_path: Path) -> None:
    """Its tensors are those of draft and optimizer, and one count a word; none is as long as the traffic."""
    world = World()
    kept, learner = learned(world, tmp_path)
    names = {name.split(".")[0] for name in Checkpoint.read(kept).tensors()}
    assert names == {"candidate", "optimizer", "emitted_counts"}
    shapes = {tuple(p.shape) for p in learner.drafts.candidate.state_dict().values()} | {(), (32,)}
    assert {tuple(t.shape) for t in Checkpoint.read(kept).tensors().values()} <= shapes
    assert {path.name for path in kept.rglob("*")} == {
        "config.json",
        "model.safetensors",
        "learner",
        "state.json",
        "state.safetensors",
    }


def test_an_embedding_of_the_drafts_own_outlives_the_learner(tmp_path: Path) -> None:
    world = World()
    draft = world.draft()
    draft.embed_tokens = world.normal(32, 32)
    save_draft(draft, tmp_path / "own", DRAFT)
    with session(world, tmp_path, draft=tmp_path / "own", sync="steps", sync_interval=1) as (shared, producer):
        first = Learner(shared)
        serve(world, first, producer, range(2))
        assert first.bank.published() > 1
        second = Learner(shared)
        for one in (second.drafts.incumbent, second.drafts.candidate):
            assert one.embed_tokens is not None and torch.equal(one.embed_tokens, draft.embed_tokens)


def test_sigterm_saves_and_ends_the_process(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, checkpoint_dir=tmp_path / "kept", learner_cpu_share=1.0) as (shared, producer):
        environment = {**os.environ, ENVIRONMENT_KEY: shared.model_dump_json(), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, "-m", "aurora_vllm.learner.process"], env=environment)
        try:
            control = ControlBlock.attach(Segment.attach(shared.control))
            send(producer, world.rows(1))
            deadline = time.monotonic() + 60
            while control.learner.step < 3:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
        finally:
            child.kill()
        found = newest(tmp_path / "kept")
        assert found is not None
        assert Checkpoint.read(found).facts["statistics"]["steps"] >= 3
