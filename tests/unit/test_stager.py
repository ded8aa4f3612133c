"""The worker's side of a rollback: what the scheduler condemned goes at the next boundary, and never comes back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch

from aurora_vllm.spec_decode import stager as module
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.exchange import Exchange, StagedWeights
from aurora_vllm.spec_decode.stager import POLL_SECONDS, Stager
from aurora_vllm.transport.bank import TensorSpec, WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.placement import CPU
from aurora_vllm.transport.segment import Segment

SPECS = [TensorSpec("w", (1,), torch.float32)]


class OneNumber:
    """A draft whose only weight is the number of the version it came with."""

    def __init__(self) -> None:
        self.live = torch.ones(1)
        self.rehearsed: list[list[TensorSpec]] = []

    def rehearse(self, specs: list[TensorSpec]) -> None:
        self.rehearsed.append(specs)

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor]) -> StagedWeights:
        staged = tensors["w"].clone()

        def trade() -> None:
            kept = self.live.clone()
            self.live.copy_(staged)
            staged.copy_(kept)

        return StagedWeights(version, [trade])


class World:
    def __init__(self, control: ControlBlock, bank: WeightBank, device: torch.device = CPU) -> None:
        self.control, self.bank, self.draft = control, bank, OneNumber()
        self.stager = Stager(bank, self.draft, control, device)  # type: ignore[arg-type]

    def publish(self, version: int, **evidence: int) -> None:
        """Published and staged, not yet live."""
        self.bank.publish(version, {"w": torch.full((1,), float(version))}, evidence)
        deadline = time.monotonic() + 5
        while self.control.worker.staged_version != version:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def step(self) -> tuple[int, int, float]:
        """A step boundary. Live version, previous version, and the version whose weights run."""
        self.stager.commit_if_ready()
        worker = self.control.worker
        return worker.live_version, worker.previous_version, float(self.draft.live)


@pytest.fixture
def world() -> Iterator[World]:
    with Segment.create("control", control_bytes()) as block, Segment.create("bank", bank_bytes(SPECS)) as segment:
        control = ControlBlock.create(block)
        control.worker.live_version = 1
        made = World(control, WeightBank.create(segment, SPECS))
        yield made
        made.stager.close()


def test_a_condemned_version_goes_and_never_comes_back(world: World) -> None:
    world.publish(2)
    assert world.step() == (2, 1, 2.0)
    world.control.scheduler.probation = "it accepts less"
    world.control.scheduler.roll_back_version = 2
    assert world.step() == (1, 2, 1.0)
    worker = world.control.worker
    assert (worker.rollbacks, worker.rolled_back_version) == (1, 2)
    assert worker.rollback == "back to version 1: it accepts less"
    for _ in range(3):
        assert world.step() == (1, 2, 1.0)  # asked for once, done once
    assert not world.stager.roll_back()
    world.stager.close()
    world.stager = Stager(world.bank, world.draft, world.control)  # type: ignore[arg-type]
    time.sleep(0.2)  # it finds version 2 in the bank
    assert world.step() == (1, 2, 1.0) and worker.rollbacks == 1


def test_what_goes_live_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.aurora")
    world.publish(2)
    world.step()
    world.control.scheduler.probation, world.control.scheduler.roll_back_version = "it accepts less", 2
    for _ in range(3):
        world.step()
    up, back, why = (record.getMessage() for record in caplog.records)
    assert up.startswith("aurora: draft version 2 is live (was 1), ") and up.endswith(" ms")
    assert back.startswith("aurora: draft version 1 is live (was 2), ")
    assert why == "aurora: back to version 1: it accepts less"


def test_the_lineage_is_the_live_versions(world: World) -> None:
    worker = world.control.worker
    world.publish(2)
    world.step()
    assert worker.live_lineage == 0
    world.publish(3, lineage=3)
    assert worker.live_lineage == 0  # not yet live
    world.step()
    assert worker.live_lineage == 3
    world.control.scheduler.roll_back_version = 3
    world.step()
    assert worker.live_lineage == 0
    world.publish(4, lineage=3)
    world.step()
    assert worker.live_lineage == 3


def test_a_newer_version_that_waits_comes_after_the_rollback(world: World) -> None:
    """The other way round the condemned one would be the version that is kept."""
    world.publish(2)
    world.step()
    world.publish(3)
    world.control.scheduler.roll_back_version = 2
    assert world.step() == (3, 1, 3.0)
    assert world.control.worker.rollbacks == 1


def fail() -> None:
    raise RuntimeError("no more")


def with_more(monkeypatch: pytest.MonkeyPatch, draft: OneNumber, *exchanges: Exchange) -> None:
    """What is staged from now on has these exchanges behind its own."""
    stage = draft.stage
    monkeypatch.setattr(
        draft,
        "stage",
        lambda version, tensors: StagedWeights(version, [*stage(version, tensors).exchanges, *exchanges]),
    )


def test_an_exchange_that_fails_half_way_costs_its_version_alone(world: World) -> None:
    worker = world.control.worker
    world.publish(2)
    assert world.step() == (2, 1, 2.0)
    with pytest.MonkeyPatch.context() as broken:
        with_more(broken, world.draft, fail)
        world.publish(3)
    assert world.step() == (2, 1, 2.0)  # whole, and what it was
    assert (worker.refusals, worker.refusal, worker.swaps) == (1, "version 3: RuntimeError: no more", 1)
    assert world.bank.held() == (2, 1)
    world.publish(4)
    assert world.step() == (4, 2, 4.0)
    assert world.stager.roll_back() and world.step() == (2, 4, 2.0)


def test_a_rollback_that_fails_leaves_the_version_there_is(world: World) -> None:
    worker, fails = world.control.worker, False

    def fail_later() -> None:
        if fails:
            fail()

    with pytest.MonkeyPatch.context() as broken:
        with_more(broken, world.draft, fail_later)
        world.publish(2)
    assert world.step() == (2, 1, 2.0)
    fails = True
    world.control.scheduler.roll_back_version = 2
    for _ in range(3):
        assert world.step() == (2, 0, 2.0)  # tried once
    assert (worker.rollbacks, worker.refusals, worker.refusal) == (0, 1, "version 1: RuntimeError: no more")
    world.publish(3)
    assert world.step() == (3, 2, 3.0)


def test_what_cannot_be_undone_ends_all_swaps_and_no_step(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    runs: list[int] = []

    def once() -> None:
        if runs:
            raise RuntimeError("CUDA error: unspecified launch failure")
        runs.append(1)

    with_more(monkeypatch, world.draft, once, fail)
    world.publish(2)
    caplog.clear()
    for _ in range(3):
        assert world.step()[:2] == (1, 0)
    assert len(caplog.records) == 1 and "is off until restart" in caplog.text
    worker = world.control.worker
    assert worker.refusals == 1 and worker.refusal.startswith("weights are not swapped until restart: HalfExchanged: ")
    world.stager._thread.join(timeout=5)
    assert not world.stager._thread.is_alive()  # what could not go live is not staged, which takes memory


def test_no_bug_reaches_the_serving_path(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(2)
    monkeypatch.setattr(world.bank, "hold", lambda live, previous: 1 / 0)
    assert world.step() == (1, 0, 1.0)
    assert "ZeroDivisionError" in world.control.worker.refusal


@pytest.mark.parametrize(
    ("fault", "said"),
    [(SwapRefused("w: not finite"), "w: not finite"), (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug")],
)
def test_a_version_that_cannot_be_staged_costs_itself_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: Exception, said: str
) -> None:
    def fail(version: int, tensors: Mapping[str, torch.Tensor]) -> StagedWeights:
        raise fault

    worker = world.control.worker
    with monkeypatch.context() as broken:
        broken.setattr(world.draft, "stage", fail)
        world.bank.publish(2, {"w": torch.full((1,), 2.0)}, {})
        deadline = time.monotonic() + 5
        while not worker.refusals:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(2 * POLL_SECONDS)  # it is not tried again
        assert world.step() == (1, 0, 1.0)
    assert (worker.refusals, worker.refusal, worker.staged_version) == (1, f"version 2: {said}", 0)
    world.publish(3)
    assert world.step() == (3, 1, 3.0)


def test_a_version_is_staged_once_and_traded_in_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traded in a second time it would be its own previous version, and there would be no way back."""
    staged, stage = [], world.draft.stage
    monkeypatch.setattr(
        world.draft, "stage", lambda version, tensors: staged.append(version) or stage(version, tensors)
    )
    world.publish(2)
    for _ in range(4):
        assert world.step() == (2, 1, 2.0)
        time.sleep(1.5 * POLL_SECONDS)  # the watcher looks again
    assert staged == [2] and world.control.worker.swaps == 1


def test_what_is_live_is_exchanged_once_before_anything_is_served(world: World) -> None:
    assert world.draft.rehearsed == [SPECS]


def test_once_closed_it_leaves_the_bank_alone(world: World) -> None:
    world.stager.close()
    assert not world.stager._thread.is_alive()


def test_while_nothing_is_served_the_newest_version_takes_the_place_of_the_one_that_waits(world: World) -> None:
    world.publish(2)
    world.publish(3)
    assert world.step() == (3, 1, 3.0)
    assert world.control.worker.swaps == 1


def test_what_the_bank_no_longer_holds_does_not_go_live(world: World) -> None:
    """Between its staging and the step boundary a newer publish took its slot: after a rollback of that one the learner
    would look for it in vain."""
    for version in (2, 3):
        world.publish(version)
        world.step()
    world.publish(4)
    newer = {"w": torch.full((1,), 5.0)}
    world.stager._stop.set()  # the watcher is slow
    world.stager._thread.join()
    world.bank.publish(5, newer, {})
    assert world.step() == (3, 2, 3.0)
    assert world.bank.held() == (3, 2) and world.control.worker.refusals == 0
    world.stager = Stager(world.bank, world.draft, world.control)  # type: ignore[arg-type]
    deadline = time.monotonic() + 5
    while world.step()[0] != 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert world.bank.held() == (5, 3)


def test_a_version_is_held_before_it_goes_live(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (2, 3):
        world.publish(version)
        world.step()
    world.publish(4)
    exchange, held = StagedWeights.exchange, []

    def watched(staged: StagedWeights) -> None:
        held.append(world.bank.held())
        exchange(staged)

    monkeypatch.setattr(StagedWeights, "exchange", watched)
    assert world.step() == (4, 3, 4.0)
    assert held == [(4, 3)]
    assert world.stager.roll_back() and world.bank.held() == (3, 4)


def test_a_condemned_version_that_is_not_live_changes_nothing(world: World) -> None:
    world.publish(2)
    world.step()
    world.control.scheduler.roll_back_version = 1
    assert world.step() == (2, 1, 2.0)
    assert world.control.worker.rollbacks == 0


def test_on_a_gpu_versions_are_staged_on_one_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, current, staged_on = [], [], []

    def stream_of(device: torch.device) -> str:
        streams.append(device)
        return f"stream {len(streams)}"

    @contextmanager
    def on(stream: str) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    waited: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "Stream", stream_of)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(module, "wait_for_this_stream", lambda device: waited.append(list(current)))
    monkeypatch.setattr(OneNumber, "rehearse", lambda draft, specs: staged_on.append(list(current)))
    gpu = torch.device("cuda:0")
    with Segment.create("control", control_bytes()) as block, Segment.create("bank", bank_bytes(SPECS)) as segment:
        control = ControlBlock.create(block)
        control.worker.live_version = 1
        made = World(control, WeightBank.create(segment, SPECS), gpu)
        stage = made.draft.stage
        monkeypatch.setattr(made.draft, "stage", lambda *args: staged_on.append(list(current)) or stage(*args))
        for version in (2, 3):
            made.publish(version)
            assert made.step()[0] == version
        made.stager.close()
    assert streams == [gpu] and staged_on == [["stream 1"]] * 3  # first what is live already
    assert waited == [[], ["stream 1"]]  # for what was live, and until it was exchanged
