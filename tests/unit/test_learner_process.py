"""The learner, driven turn by turn: rows in, trained, judged, published, and what it does with what is broken."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_vllm.learner import curriculum, process
from aurora_vllm.learner import learner as learner_module
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.learner import SCORE_BACKLOG, Learner
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.session import ENVIRONMENT_KEY
from aurora_vllm.transport.rows import Field, RowFlag
from tests.unit.tiny_world import LAYOUT, World, assert_same, send, serve, session, trajectory, weights

pytestmark = pytest.mark.usefixtures("same_every_time")


def test_rows_are_trained_on_judged_and_published(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        block, unseen = learner.control.learner, trajectory(world)
        before = simulate(learner.drafts.incumbent, learner.head, unseen, 2).acceptance_length
        for request in range(60):
            serve(world, learner, producer, range(request, request + 1))
            if block.publishes:
                break
        assert (learner.drafts.version, block.published_version, learner.bank.published()) == (2, 2, 2)
        publication = learner.bank.read(2)
        assert "beats incumbent" in publication.evidence["reason"]
        assert publication.evidence["step"] == learner.curriculum.trainer.steps - 1 > 0  # one more was trained since
        assert block.step == learner.curriculum.trainer.steps
        assert_same(publication.tensors, weights(learner.drafts.incumbent))
        assert simulate(learner.drafts.incumbent, learner.head, unseen, 2).acceptance_length > before + 0.02
        assert block.shadow_version == 2 and block.shadow_steps > 0
        assert block.trajectories == request + 1 and block.tokens_seen == 20 * (request + 1)
        assert block.replay_trajectories == len(learner.curriculum.replay) > 0  # SGLang's pool_size
        assert block.replay_tokens == learner.curriculum.replay.tokens and block.replay_bytes > 0
        assert 0 < block.vocabulary_coverage <= 1


def test_a_loser_is_not_published(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, learning_rate=1e-9) as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(30))
        assert learner.curriculum.trainer.steps > 10 and learner.bank.published() == 0
        assert "does not beat incumbent" in learner.control.learner.message


def test_a_trajectory_is_scored_before_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, done = World(), []
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)

        def score(draft: Any, head: Any, one: Trajectory, length: int) -> Any:
            done.append(("score", one.request))
            return simulate(draft, head, one, length)

        def batch(chosen: list[Trajectory], device: torch.device) -> Any:
            done.extend(("train", one.request) for one in chosen)
            return collate(chosen, device)

        monkeypatch.setattr(learner_module, "simulate", score)
        monkeypatch.setattr(curriculum, "collate", batch)
        serve(world, learner, producer, range(12))
    for request in range(12):
        assert done.index(("score", request)) < done.index(("train", request))


def test_a_request_that_there_is_no_memory_to_score_is_trained_on_unscored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        monkeypatch.setattr(learner_module, "simulate", fails)
        serve(world, learner, producer, range(6))
        block = learner.control.learner
        assert block.message == "OutOfMemoryError in scoring a request, which is no evidence: no room"
        assert block.steps_taken > 0 and learner.evidence.decide(0.0).tokens == 0


def test_what_cannot_be_scored_in_time_is_trained_on_unscored(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        many = SCORE_BACKLOG + 9
        for request in range(many):
            send(producer, world.rows(request))
        learner.turn()  # takes all, scores one
        assert [one.request for one in learner.unscored] == list(range(10, many))
        assert len(learner.curriculum.replay) == 9 + 1  # the oldest unscored, and the one that was
        scored = learner.evidence.decide(0.0).tokens
        assert 0 < scored <= 16
        turns = 0
        while learner.unscored:
            learner.turn()
            turns += 1
        assert turns == SCORE_BACKLOG - 1 and len(learner.curriculum.replay) == many
        assert learner.curriculum.trainer.steps == 0  # scoring goes first


@pytest.mark.parametrize("awaits", [True, False])
def test_before_the_first_lesson_there_is_hardly_anything_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, awaits: bool
) -> None:
    """A draft with another vocabulary has scores of its own; the lesson goes first all the same."""
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        monkeypatch.setattr(curriculum.Curriculum, "awaits_first_lesson", awaits)
        monkeypatch.setattr(learner.curriculum, "next", lambda: "first lesson" if awaits else "training")
        monkeypatch.setattr(learner.curriculum, "work", lambda: False)
        monkeypatch.setattr(learner_module, "WATCHING_SHARE", 0.0)
        learner.drafts.candidate_changed()
        learner.score_seconds = 1.0
        send(producer, world.rows(0))
        learner.turn()
        assert len(learner.unscored) == int(awaits)


def test_a_step_that_is_not_finite_is_dropped_and_said(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(4))
        before, steps = weights(learner.drafts.candidate), learner.curriculum.trainer.steps
        bad = trajectory(world, 4)
        bad.aux[5:9] = torch.nan
        learner.remember(bad)
        learner.turn()
        assert_same(weights(learner.drafts.candidate), before)
        assert learner.curriculum.trainer.steps == steps
        block = learner.control.learner
        assert block.message.startswith("a training step was not finite")
        assert block.trajectories_discarded == learner.curriculum.dropped >= 1
        assert all(one.trajectory.request != 4 for one in learner.curriculum.replay._window)
        serve(world, learner, producer, range(5, 8))
        assert learner.curriculum.trainer.steps > steps


def test_states_that_are_not_finite_never_come_to_be_learned_from(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path) as (shared, producer):
        learner = Learner(shared)
        bad = world.rows(0)
        LAYOUT.aux(bad)[5:9] = torch.nan
        send(producer, bad)
        serve(world, learner, producer, range(1, 2))
        assert [one.trajectory.request for one in learner.curriculum.replay._window] == [1]
        learner._show_discarded()
        assert learner.control.learner.trajectories_discarded == 1


def test_a_lesson_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    with session(world, tmp_path) as (shared, _):
        learner = Learner(shared)

        def fail() -> bool:
            learner.curriculum.fault = "a lesson failed"
            return False

        monkeypatch.setattr(learner.curriculum, "next", lambda: "lesson")
        monkeypatch.setattr(learner.curriculum, "work", fail)
        assert learner.turn()
        assert learner.control.learner.message == "a lesson failed" and not learner.drafts.candidate_is_ahead


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_rejected_rows_are_kept_for_the_discard_term_alone(tmp_path: Path, weight: float) -> None:
    world = World()
    with session(world, tmp_path, discard_weight=weight) as (shared, producer):
        learner = Learner(shared)
        rows = world.rows(0)
        wrong = rows[10:11].clone()
        LAYOUT.meta(wrong)[0, Field.FLAGS] = int(RowFlag.REJECTED)
        send(producer, torch.cat([rows[:10], wrong, rows[10:]]))
        learner.turn()
        (held,) = learner.curriculum.replay._window
        assert len(held.trajectory.branches) == int(weight > 0)


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=1) as (shared, producer):
        learner = Learner(shared)
        serve(world, learner, producer, range(1))
        good, published = weights(learner.drafts.incumbent), learner.bank.published()
        assert published > 0
        with torch.no_grad():
            learner.drafts.candidate.fc.weight[0, 0] = torch.nan
        learner.drafts.candidate_changed()
        learner.sync = type(learner.sync)("steps", 0)
        learner.evidence.add(Score(50, (0, 0)), Score(50, (9, 0)))
        restarted: list[str] = []
        learner.sleep.restart = restarted.append  # type: ignore[method-assign]
        learner.publisher.publish_if_due()
        assert learner.evidence.decide(0.0).tokens == 0 and restarted == ["the candidate was not finite"]
        assert learner.bank.published() == published
        assert "fc.weight is not finite" in learner.control.learner.message
        for draft in (learner.drafts.candidate, learner.curriculum.trainer.draft):
            assert_same(weights(draft), good)
        assert not learner.curriculum.trainer.optimizer.state
        serve(world, learner, producer, range(1, 3))
        assert learner.bank.published() > published


@pytest.mark.parametrize("policy", ["steps", "requests"])
def test_auroras_own_policies_publish_by_the_count_alone(tmp_path: Path, policy: str) -> None:
    world = World()
    settings: dict[str, Any] = {"sync": policy, "sync_interval": 5, "learning_rate": 1e-9, "evidence_tokens": 10**6}
    with session(world, tmp_path, **settings) as (shared, producer):
        learner = Learner(shared)
        at: list[int] = []
        for request in range(22):
            before = learner.bank.published()
            serve(world, learner, producer, range(request, request + 1))
            if learner.bank.published() != before:
                at.append(request + 1)  # one step a request
        assert at == [5, 10, 15, 20]
        assert learner.bank.read(5).evidence["reason"] == f"5 {policy} since the last publish"


def test_the_next_learner_goes_on_from_the_bank(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=3) as (shared, producer):
        first = Learner(shared)
        serve(world, first, producer, range(7))
        published = first.bank.published()
        assert published > 1
        second = Learner(shared)  # as after kill -9 of the first
        assert second.drafts.version == published
        assert_same(weights(second.drafts.incumbent), first.bank.read(published).tensors)
        assert_same(weights(second.drafts.candidate), weights(second.drafts.incumbent))
        serve(world, second, producer, range(7, 14))
        assert second.bank.published() > published

        slot = next(slot for slot in second.bank._slots if slot.words.version == second.bank.published())
        slot.words.sequence = 1  # torn: its writer died in it
        assert Learner(shared).drafts.version == 1


def test_a_publish_that_was_cut_short_leaves_the_live_version_to_go_on_from(tmp_path: Path) -> None:
    """The worker has not taken version 3 yet; where it holds two others, 4 is written over it."""
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=1) as (shared, producer):
        first = Learner(shared)
        for version in (2, 3):
            serve(world, first, producer, range(version, version + 1))
            assert first.bank.published() == first.drafts.version == version
        first.bank.hold(live=2, previous=1)
        first.control.worker.live_version = 2
        slot = next(slot for slot in first.bank._slots if slot.words.version == 3)
        slot.words.sequence = 1
        second = Learner(shared)
        assert second.drafts.version == 2
        assert_same(weights(second.drafts.incumbent), first.bank.read(2).tensors)
        assert second.publisher.next_version() == 4


def test_without_a_server_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv(ENVIRONMENT_KEY, raising=False)
    assert process.main() == 2
    assert "started by the server" in capsys.readouterr().err


def test_the_number_of_a_publish_that_was_not_finished_is_not_taken_again(tmp_path: Path) -> None:
    world = World()
    with session(world, tmp_path, sync="steps", sync_interval=1) as (shared, producer):
        first = Learner(shared)
        serve(world, first, producer, range(1))
        published = first.bank.published()
        first.bank._learner.published = published - 1  # as where it was killed before it said so
        second = Learner(shared)
        serve(world, second, producer, range(1, 2))
        assert second.bank.published() == second.drafts.version == published + 1


class Rehearsal:
    """A learner and an event of straw, and what the process asked of them. Turns: whether it rests, and whether the
    control block says it works; waits: seconds, and the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shared: Any, turns: list[tuple[bool, float, bool]]) -> None:
        """turns: whether there was work, what the budget says is owed after it, and whether that is not all."""
        self.turns: list[tuple[bool, bool]] = []
        self.waits: list[tuple[float, bool]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.saves: list[bool] = []
        self.threads: list[int] = []
        self.handlers: dict[int, Callable[[int, None], None]] = {}
        self.block = SimpleNamespace(pid=0, working=False)
        scheduler = SimpleNamespace(steps=40, learner_share=0.0, in_flight=0)
        budget, left = SimpleNamespace(owes_more=False), iter(turns)

        def turn(rests: bool) -> bool:
            self.turns.append((rests, self.block.working))
            worked, self.owed, self.more = next(left)
            return worked

        def debt(*args: Any) -> float:
            self.asked.append(args)
            scheduler.steps, scheduler.learner_share, scheduler.in_flight = scheduler.steps + 1, 0.25, 1
            budget.owes_more = self.more
            return self.owed

        budget.debt = debt
        learner = SimpleNamespace(
            control=SimpleNamespace(learner=self.block, scheduler=scheduler), turn=turn, gpu_time=None, budget=budget,
            keeper=SimpleNamespace(save=lambda at_once=False: self.saves.append(at_once)),
            sleep=SimpleNamespace(idle_s=0.05),
        )  # fmt: skip
        stop = SimpleNamespace(
            is_set=lambda: len(self.waits) == len(turns),
            wait=lambda seconds: self.waits.append((seconds, self.block.working)),
        )
        self.learner = learner
        monkeypatch.setenv(ENVIRONMENT_KEY, shared.model_dump_json())
        monkeypatch.setattr(process, "Learner", lambda session: learner)
        monkeypatch.setattr(process, "threading", SimpleNamespace(Event=lambda: stop))
        monkeypatch.setattr(process.signal, "signal", self.handlers.__setitem__)
        monkeypatch.setattr(torch, "set_num_threads", self.threads.append)  # of this process, too


def test_the_process_rests_as_long_as_its_budget_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path) as (shared, _):
        it = Rehearsal(
            monkeypatch,
            shared,
            [(True, 0.0, False), (True, 2.0, True), (False, 1.5, False), (False, 0.0, False), (False, 0.01, False)],
        )
        assert process.main() == 0
    assert it.turns == [(False, True), (False, True), (True, False), (False, True), (False, True)]
    # Nothing owed and work to do: on at once. Where there is none it looks around again after a while.
    assert it.waits == [(0.0, True), (2.0, False), (1.5, False), (0.05, False), (0.05, False)]
    # As many steps as the engine made, the share that the scheduler leaves it (all, before it said so), and in flight.
    assert it.asked == [(40, 1.0, 0), (41, 0.25, 1), (42, 0.25, 1), (43, 0.25, 1), (44, 0.25, 1)]
    assert it.saves == [False] * 5 + [True]  # each time that one may be due, and at the end in any case
    assert it.block.pid == os.getpid()


def test_the_process_tells_its_budget_that_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    with session(World(), tmp_path) as (shared, _):
        it = Rehearsal(monkeypatch, shared, [(False, 0.0, False)])
        it.learner.budget.continues = lambda: told.append(True)
        assert process.main() == 0
    assert not told
    it.handlers[signal.SIGCONT](signal.SIGCONT, None)
    assert told == [True]


def test_on_a_gpu_the_process_counts_the_gpus_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path) as (shared, _):
        it = Rehearsal(monkeypatch, shared, [(True, 0.0, False), (False, 0.0, False)])
        counted: list[bool] = []
        it.learner.gpu_time = SimpleNamespace(run=lambda work: counted.append(work()) or counted[-1])
        assert process.main() == 0
    assert counted == [True, False] and len(it.turns) == 2
    assert [seconds for seconds, _ in it.waits] == [0.0, 0.05]


def test_the_process_takes_as_many_threads_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path, learner_threads=3) as (shared, _):
        it = Rehearsal(monkeypatch, shared, [(False, 0.0, False)])
        assert process.main() == 0
    assert it.threads == [3]
