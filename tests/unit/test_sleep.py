"""A learner that falls asleep when it has learnt what there is, and wakes when there is something new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.control import drift
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.sleep import ASLEEP_S, IDLE_S, NEW_TOKENS
from aurora_vllm.learner.standing import follow_rollback
from aurora_vllm.transport.ring import RingProducer
from tests.unit.tiny_world import V, World, assert_same, send, session, weights

pytestmark = pytest.mark.usefixtures("same_every_time")
ANSWER = 60  # words, so that a request is an observation


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "TRIAL_STEPS", 20)


def serve(world: World, learner: Learner, producer: RingProducer, requests: range) -> int:
    """Until the learner falls asleep or wakes. Requests that took."""
    before = learner.sleep.asleep
    for request in requests:
        send(producer, world.rows(request, answer=ANSWER))
        learner.turn()
        learner.turn()
        if learner.sleep.asleep != before:
            return request - requests.start + 1
    return len(requests)


def fall_asleep(world: World, learner: Learner, producer: RingProducer, first: int = 0) -> int:
    """The next request's number."""
    last = first + serve(world, learner, producer, range(first, first + 300))
    assert learner.sleep.asleep
    return last


def test_it_sleeps_when_it_has_learnt_and_wakes_when_the_traffic_is_another(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        block = learner.control.learner
        assert (block.asleep, block.sleep, learner.sleep.idle_s) == (False, "awake", IDLE_S)
        request = fall_asleep(world, learner, producer)
        assert (block.asleep, block.sleeps, learner.sleep.idle_s) == (True, 1, ASLEEP_S)
        assert block.sleep.startswith("sleeps: ") and "steps of training took acceptance length from" in block.sleep
        assert block.publishes > 0  # it was worth trying
        assert block.trial_gain < drift.MEANINGFUL
        assert learner.curriculum.trainer.steps >= drift.TRIAL_STEPS

        steps, asleep = learner.curriculum.trainer.steps, weights(learner.drafts.candidate)
        seen = learner.curriculum.tokens_seen
        assert serve(world, learner, producer, range(request, request + 80)) == 80  # more of the same
        assert block.state == "sleeping" and learner.sleep.asleep
        assert learner.curriculum.trainer.steps == steps
        assert_same(weights(learner.drafts.candidate), asleep)
        assert learner.curriculum.tokens_seen == seen + 80 * (4 + ANSWER)  # it knows what is said
        assert not learner.unscored

        length = 1 + sum(learner.drafts.shadow.per_position())
        world.follows = torch.randperm(V, generator=torch.Generator().manual_seed(9))
        took = serve(world, learner, producer, range(400, 500))
        assert took <= 12 and not block.asleep
        assert block.sleep.startswith("woke: acceptance length fell from ")
        fell_to = 1 + sum(block.shadow_accepted_per_position)
        assert fell_to < length  # serving was told

        request = fall_asleep(world, learner, producer, 500)
        assert learner.curriculum.trainer.steps > steps + drift.TRIAL_STEPS
        assert block.sleeps == 2 and 1 + sum(block.shadow_accepted_per_position) > fell_to  # it learnt the new words


def test_the_sleeper_looks_at_one_in_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora_vllm.learner import learner as module

    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        request = fall_asleep(world, learner, producer)
        looked, simulate = [], module.simulate

        def counted(*args: Any) -> Any:
            assert args[0] is learner.drafts.incumbent
            looked.append(args[2].request)
            return simulate(*args)

        monkeypatch.setattr(module, "simulate", counted)
        serve(world, learner, producer, range(request, request + 40))
        assert looked[:2] == [request, request + drift.WATCH_EVERY]
        assert 10 <= len(looked) <= 14  # the one after a bad one, too


def test_a_sleeper_looks_at_one_request_in_a_turn(tmp_path: Path) -> None:
    """Those in between cost nothing; a second look would come before the rest that the first one owes."""
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        request = fall_asleep(world, learner, producer)
        learner.unscored.clear()
        for _ in range(drift.WATCH_EVERY):  # whatever it looked at last
            learner.sleep._watch.next_is_due()  # type: ignore[union-attr]
        for one in range(drift.WATCH_EVERY + 2):
            send(producer, world.rows(request + one, answer=ANSWER))
        assert learner.turn() and len(learner.unscored) == drift.WATCH_EVERY + 1
        assert learner.turn() and len(learner.unscored) == 1
        assert not learner.turn() and not learner.unscored and learner.sleep.asleep


def test_what_other_drafts_accepted_is_not_usual(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, learning_rate=3e-4) as (shared, producer):
        learner = Learner(shared)
        for request in range(40):
            serve(world, learner, producer, range(request, request + 1))
            if learner.sleep._usual:
                break
        assert learner.sleep._usual and not learner.sleep.asleep
        learner.sleep.restart("another draft was loaded")
        assert not learner.sleep._usual


def test_what_was_slept_through_is_not_caught_up_on(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, replay_passes=1.0) as (shared, producer):
        learner = Learner(shared)
        curriculum = learner.curriculum
        request = fall_asleep(world, learner, producer)
        while curriculum.next():
            curriculum.work()
        serve(world, learner, producer, range(request, request + 100))
        before = curriculum.tokens_trained
        learner.sleep.restart("a test said so")
        assert learner.control.learner.sleep == "woke: a test said so"
        while curriculum.next():
            curriculum.work()
        batch = learner.config.batch_tokens
        assert NEW_TOKENS - batch <= curriculum.tokens_trained - before <= NEW_TOKENS + 2 * batch < 100 * (4 + ANSWER)


def test_a_sleepers_evidence_is_of_before_its_sleep(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        request = fall_asleep(world, learner, producer)
        learner.drafts.candidate_changed()
        assert learner.evidence.decide(0.0).tokens > 0
        learner.curriculum.coverage.counts[words_it_may_not_say(learner)] = 0
        world.follows = torch.randperm(V, generator=torch.Generator().manual_seed(9))
        assert serve(world, learner, producer, range(request, request + 100)) < 100
        assert learner.evidence.decide(0.0).tokens == 0


def test_it_does_not_sleep_before_its_lessons(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, learning_rate=1e-9) as (shared, producer):
        learner = Learner(shared)
        learner.curriculum._lessons_due = [10**9]  # the second one; the first was learnt
        assert serve(world, learner, producer, range(60)) == 60
        assert learner.control.learner.sleep == "awake" and learner.curriculum.trainer.steps > drift.TRIAL_STEPS
        learner.curriculum.skip_lessons()
        fall_asleep(world, learner, producer, 60)


@pytest.mark.parametrize("settings", [{"learner_sleep": False}, {"sync": "steps", "sync_interval": 50}])
def test_it_never_sleeps_where_it_must_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    world = World()
    with session(world, tmp_path, learning_rate=1e-9, **settings) as (shared, producer):
        learner = Learner(shared)
        assert serve(world, learner, producer, range(80)) == 80
        assert learner.control.learner.sleep == "never sleeps, by the settings"


def test_a_learner_that_gains_goes_on(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, learning_rate=3e-4) as (shared, producer):
        learner = Learner(shared)
        said = set()
        for request in range(70):
            serve(world, learner, producer, range(request, request + 1))
            said.add(learner.control.learner.sleep)
        assert any("awake: 2" in words and "steps of training took" in words for words in said), said
        assert not learner.sleep.asleep


def words_it_may_not_say(learner: Learner) -> list[int]:
    return [word for word in range(V) if word not in learner.drafts.incumbent.target_ids.tolist()]


def test_a_rollback_wakes_it_and_so_does_another_vocabulary(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        block, counts = learner.control.learner, learner.curriculum.coverage.counts
        request = fall_asleep(world, learner, producer)
        learner.control.worker.rolled_back_version = gone = learner.drafts.version
        learner.control.worker.live_version = 1
        follow_rollback(learner)
        assert block.sleep == f"woke: version {gone} was rolled back" and not block.asleep

        learner.control.worker.rolled_back_version = 0
        request = fall_asleep(world, learner, producer, request)
        counts[words_it_may_not_say(learner)] += counts.sum() / 10
        serve(world, learner, producer, range(request, request + 1))
        assert block.sleep == "woke: the draft vocabulary was chosen anew" and not block.asleep


def test_lost_coverage_wakes_it_where_no_other_vocabulary_is_looked_for(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, vocabulary_coverage=0) as (shared, producer):
        learner = Learner(shared)
        counts = learner.curriculum.coverage.counts
        request = fall_asleep(world, learner, producer)
        counts[words_it_may_not_say(learner)] += counts.sum() / 10
        serve(world, learner, producer, range(request, request + 1))
        assert learner.control.learner.sleep.startswith("woke: the draft vocabulary covers 0.")
