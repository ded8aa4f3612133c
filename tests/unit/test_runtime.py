"""What a run owns besides vLLM: its shared memory and its learner, from the first to the last."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_vllm import plan, runtime
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.runtime import Runtime
from aurora_vllm.session import ENVIRONMENT_KEY, Session
from aurora_vllm.supervisor import HANG_CPU_S, HANG_S, SAVE_S, STOP_S
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingProducer
from aurora_vllm.transport.segment import SHM, NoSharedMemory, Segment
from tests.unit.plan_world import draft_dir, serve_plan, target

__all__ = ["draft_dir", "serve_plan", "target"]  # fixtures


class Keeper:
    """In a supervisor's place."""

    made: Keeper

    def __init__(
        self,
        block: Any,
        ready: Any,
        threads: int,
        nice: int,
        stop_s: float,
        heartbeat: Any,
        hang_s: float,
        hang_cpu_s: float,
    ) -> None:
        self.block, self.ready, self.options, self.calls = block, ready, (threads, nice, stop_s), []
        self.heartbeat, self.hangs = heartbeat, (hang_s, hang_cpu_s)
        Keeper.made = self

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def ways_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What is called at a process's end, and nothing of it left behind in this one."""
    found = SimpleNamespace(exits=[], cleanups=[], at_once=[])
    monkeypatch.setenv(ENVIRONMENT_KEY, "")  # so that it is put back
    monkeypatch.setattr(runtime.atexit, "register", found.exits.append)
    monkeypatch.setattr(runtime.stopping, "cleanups", found.cleanups)
    monkeypatch.setattr(runtime.stopping, "at_once", found.at_once)
    monkeypatch.setattr(runtime, "Supervisor", Keeper)
    monkeypatch.setattr(runtime, "engine_is_up", threading.Event())
    yield found


def own_segments() -> set[str]:
    return {path.name for path in SHM.glob(f"aurora-{os.getpid()}-*")}


def with_settings(serve_plan: plan.ServePlan, **settings: Any) -> plan.ServePlan:
    return replace(serve_plan, config=AuroraConfig(ring_mb=1, **settings))


def test_a_run_makes_its_memory_says_where_it_is_and_leaves_nothing(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace
) -> None:
    before = own_segments()
    with Runtime(with_settings(serve_plan, learner_threads=2, learner_nice=5), told_when_up=True) as run:
        said = Session.from_environment()
        assert said == run.session
        ring = RingProducer.attach(Segment.attach(said.ring))
        assert (ring.capacity, ring.row_bytes) == (serve_plan.ring_rows, serve_plan.layout.row_bytes)
        assert WeightBank.attach(Segment.attach(said.bank)).specs == list(serve_plan.draft.specs)
        ControlBlock.attach(Segment.attach(said.control))
        assert said.row_layout == serve_plan.layout and said.vllm_version == serve_plan.vllm_version
        assert (said.target, said.draft, said.resume) == (serve_plan.target.directory, serve_plan.draft.directory, None)
        keeper = Keeper.made
        assert keeper.calls == ["start"] and keeper.options == (2, 5, STOP_S) and keeper.hangs == (HANG_S, HANG_CPU_S)
        asleep = keeper.heartbeat()
        ControlBlock.attach(Segment.attach(said.control)).learner.beat()
        assert keeper.heartbeat() != asleep
        # A signal ends the learner at once, and whichever way the process ends it leaves nothing.
        assert ways_out.at_once == [keeper.stop] and ways_out.cleanups == ways_out.exits == [run.close]
        assert len(own_segments() - before) == 3
    assert keeper.calls == ["start", "stop"] and own_segments() == before
    run.close()


def test_the_learner_starts_when_the_engine_is_up(serve_plan: plan.ServePlan, ways_out: SimpleNamespace) -> None:
    """The endpoint plugin says so; where vLLM loads it elsewhere or not at all, the worker's word is taken."""
    for told in (True, False):
        with Runtime(with_settings(serve_plan), told_when_up=told) as run:
            control = ControlBlock.attach(Segment.attach(run.session.control))
            assert not Keeper.made.ready()
            if told:
                control.worker.attached = True
                assert not Keeper.made.ready()
                runtime.engine_is_up.set()
            else:
                runtime.engine_is_up.set()
                assert not Keeper.made.ready()
                control.worker.attached = True
            assert Keeper.made.ready()
        runtime.engine_is_up.clear()


def test_a_learner_that_saves_gets_the_time_to(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace, tmp_path: Path
) -> None:
    with Runtime(with_settings(serve_plan, checkpoint_dir=tmp_path), told_when_up=True):
        assert Keeper.made.options[-1] == SAVE_S > STOP_S


def test_where_nothing_is_to_be_learned_no_learner_starts(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace
) -> None:
    Keeper.made = None  # type: ignore[assignment]
    with Runtime(with_settings(serve_plan, learn=False), told_when_up=True):
        assert Keeper.made is None and ways_out.at_once == []


def test_a_resumed_checkpoint_is_what_the_learner_goes_on_from(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace
) -> None:
    resumed = replace(serve_plan, draft=replace(serve_plan.draft, origin="resumed"))
    with Runtime(resumed, told_when_up=True) as run:
        assert run.session.resume == serve_plan.draft.directory


def test_without_room_it_is_one_line_and_nothing_stays(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, create = own_segments(), Segment.create

    def full(kind: str, size: int) -> Segment:
        if kind == "control":
            raise NoSharedMemory("no room")
        return create(kind, size)

    monkeypatch.setattr(Segment, "create", full)
    with pytest.raises(AuroraError, match="no room"):
        Runtime(serve_plan, told_when_up=True)
    assert own_segments() == before


def test_what_servers_left_that_were_killed_is_swept_first(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace
) -> None:
    left = SHM / f"aurora-{2**22 + 1}-1-0123456789abcdef-ring"  # above the largest pid there is
    left.touch()
    try:
        with Runtime(with_settings(serve_plan, learn=False), told_when_up=True):
            assert not left.exists()
    finally:
        left.unlink(missing_ok=True)


def test_a_forked_child_leaves_its_parents_things(
    serve_plan: plan.ServePlan, ways_out: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime(with_settings(serve_plan), told_when_up=True) as run:
        made, parent = own_segments(), os.getpid()
        monkeypatch.setattr(runtime.os, "getpid", lambda: parent + 1)  # as the handlers in the child see it
        run.close()
        monkeypatch.undo()
        assert own_segments() == made and Keeper.made.calls == ["start"]
        monkeypatch.setenv(ENVIRONMENT_KEY, "")
