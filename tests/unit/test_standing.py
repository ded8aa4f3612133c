"""The learner after a rollback: it goes on from the version that stayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.standing import follow_rollback
from aurora_vllm.transport.ring import RingProducer
from tests.unit.test_learner_process import assert_same, serve, weights
from tests.unit.tiny_world import World, session

pytestmark = pytest.mark.usefixtures("same_every_time")


def learn_until(world: World, learner: Learner, producer: RingProducer, version: int, request: int) -> int:
    """Serve until a version is out; the worker takes it. The next request's number."""
    worker = learner.control.worker
    while learner.drafts.version < version:
        serve(world, learner, producer, range(request, request + 1))
        request += 1
    worker.previous_version, worker.live_version = worker.live_version, version
    learner.bank.hold(live=version, previous=worker.previous_version)
    return request


def roll_back(learner: Learner) -> None:
    """What the worker does."""
    worker = learner.control.worker
    worker.live_version, worker.previous_version = worker.previous_version, worker.live_version
    worker.rolled_back_version = worker.previous_version
    learner.bank.hold(live=worker.live_version, previous=worker.previous_version)


@pytest.mark.parametrize("stayed", [1, 2])
def test_it_goes_on_from_the_version_that_stayed(tmp_path: Path, stayed: int) -> None:
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=3) as (shared, producer):
        learner = Learner(shared)
        learner.control.worker.live_version = 1
        request = 0
        kept = weights(learner.drafts.incumbent)
        for version in range(2, stayed + 1):
            request = learn_until(world, learner, producer, version, request)
            kept = weights(learner.drafts.incumbent)
        request = learn_until(world, learner, producer, stayed + 1, request)
        serve(world, learner, producer, range(request, request + 1))  # the candidate learns on, from a bad draft
        bad = weights(learner.drafts.incumbent)
        roll_back(learner)
        follow_rollback(learner)  # a turn would train at once
        assert learner.drafts.version == stayed
        assert_same(weights(learner.drafts.incumbent), kept)
        assert_same(weights(learner.drafts.candidate), kept)
        block = learner.control.learner
        assert (block.shadow_version, block.published_version) == (stayed, stayed + 1)

        # A learner started now begins there too, not with what was published last.
        second = Learner(shared)
        assert second.drafts.version == stayed
        assert_same(weights(second.drafts.candidate), kept)

        again = stayed + 2
        learn_until(world, learner, producer, again, request + 1)
        published = learner.bank.read(again).tensors
        assert any(not torch.equal(published[name], bad[name]) for name in bad)
        assert any(not torch.equal(published[name], kept[name]) for name in kept)


def test_a_lesson_founds_a_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient steps go on with it, a rollback behind the lesson goes back to the older one."""
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=3) as (shared, producer):
        learner = Learner(shared)
        learner.control.worker.live_version = 1
        request = learn_until(world, learner, producer, 2, 0)
        with monkeypatch.context() as patched:
            patched.setattr(learner.curriculum, "work", lambda: True)  # a lesson
            learner._work()
        for version in (3, 4):
            request = learn_until(world, learner, producer, version, request)
        assert [learner.bank.read(version).lineage for version in (2, 3, 4)] == [0, 3, 3]
        roll_back(learner)
        follow_rollback(learner)
        assert learner.drafts.lineage == Learner(shared).drafts.lineage == 3
        with monkeypatch.context() as patched:
            patched.setattr(learner.curriculum, "work", lambda: True)
            learner._work()
        request = learn_until(world, learner, producer, 5, request)
        assert learner.bank.read(5).lineage == 5
        roll_back(learner)
        follow_rollback(learner)
        learn_until(world, learner, producer, 6, request)
        assert learner.bank.read(6).lineage == 3  # what the lesson had made was rolled back


def test_nothing_is_published_before_something_new_was_learned(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=1) as (shared, producer):
        learner = Learner(shared)
        learner.control.worker.live_version = 1
        learn_until(world, learner, producer, 2, 0)
        roll_back(learner)
        learner.curriculum.replay.remove(learner.curriculum.replay.newest(10**9))  # nothing to train on
        for _ in range(5):
            learner.turn()
        assert learner.drafts.version == 1 and learner.bank.published() == 2
        assert learner.control.learner.message.startswith("version 2 was rolled back: learning goes on from version 1")


def test_a_rollback_of_an_older_version_is_not_its_business(tmp_path: Path) -> None:
    """It published a newer one meanwhile, which has a probation of its own."""
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=2) as (shared, producer):
        learner = Learner(shared)
        learner.control.worker.live_version = 1
        request = learn_until(world, learner, producer, 2, 0)
        while learner.drafts.version < 3:  # published, not yet taken
            serve(world, learner, producer, range(request, request + 1))
            request += 1
        incumbent = weights(learner.drafts.incumbent)
        roll_back(learner)
        learner.turn()
        assert learner.drafts.version == 3
        assert_same(weights(learner.drafts.incumbent), incumbent)
