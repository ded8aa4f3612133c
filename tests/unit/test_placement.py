"""Ring and bank on a device that two sides share: who makes it, who opens it, and what is left where it fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.learner import process
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.target import lent_target_head
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.transport import placement, probe
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.cuda import NoDeviceMemory
from aurora_vllm.transport.placement import CPU, HeadTensors, join, lend_target_head, place
from aurora_vllm.transport.ring import RingConsumer, RingGauge, RingProducer
from aurora_vllm.transport.segment import SHM, Segment
from tests.unit.pretend_device import DEVICE, Far, pretend_device
from tests.unit.test_device_memory import Device, Side
from tests.unit.test_runner_v2 import StrawRunner
from tests.unit.tiny_world import World, send, serve, session


class Piece(Side):
    """One process's view of a named piece."""

    def __init__(self, shared: Device, name: str, device: torch.device, released: list[str]) -> None:
        super().__init__(shared)
        self.name, self.device, self._released = name, device, released
        if "bank" in name:  # of which every word was waited for before it is spoken of
            self.bytes = shared.memory

    def release(self) -> None:
        self._released.append(self.name)


class Lent(Piece):
    """What lies where it lay, the same memory on both sides."""

    def __init__(self, shared: Device, name: str, device: torch.device, released: list[str]) -> None:
        super().__init__(shared, name, device, released)
        self.bytes = shared.memory

    def hand_over(self) -> None:
        self.calls.append(("hand_over", self.look()))

    take_over = hand_over


class StandIn:
    """A place whose memory does nothing before somebody waits for it. refuses: a kind that is not to be had."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.made: dict[str, tuple[Device, torch.device]] = {}
        self.opened: list[str] = []
        self.released: list[str] = []

    def create(self, kind: str, size: int, device: torch.device) -> Piece:
        if kind == self.refuses:
            raise NoDeviceMemory(f"cannot allocate {kind}: CUDA_ERROR_OUT_OF_MEMORY\nCompile with `TORCH_USE_CUDA_DSA`")
        shared = Device(size)
        if device == DEVICE:
            shared.memory = shared.memory.to(device)
        name = f"aurora-1-1-0123456789abcdef-{kind}"
        self.made[name] = shared, device
        return Piece(shared, name, device, self.released)

    def lend(self, kind: str, tensor: torch.Tensor) -> Piece:
        if kind == self.refuses:
            raise NoDeviceMemory("cannot share memory of the GPU: CUDA_ERROR_INVALID_VALUE (1)")
        shared = Device(0)
        shared.memory = tensor.view(-1).view(torch.uint8)
        name = f"aurora-1-1-0123456789abcdef-{kind}"
        self.made[name] = shared, tensor.device
        return Lent(shared, name, tensor.device, self.released)

    def open(self, name: str) -> Piece:
        self.opened.append(name)
        kind = Lent if name in (EMBEDDING, LM_HEAD) else Piece
        return kind(self.made[name][0], name, self.made[name][1], self.released)


RING, BANK = "aurora-1-1-0123456789abcdef-ring_memory", "aurora-1-1-0123456789abcdef-bank_memory"

EMBEDDING, LM_HEAD = (RING.replace("ring", kind) for kind in ("embedding", "lm_head"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names that another process was to open."""
    names: list[list[str]] = []
    monkeypatch.setattr(placement, "try_elsewhere", lambda device, asked: names.append(list(asked)))
    return names


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)


def use(monkeypatch: pytest.MonkeyPatch, stand_in: Any) -> Any:
    monkeypatch.setattr(placement, "memory_for", lambda device: stand_in)
    return stand_in


def parts(shared: Session) -> tuple[Segment, Segment, ControlBlock]:
    return Segment.attach(shared.ring), Segment.attach(shared.bank), ControlBlock.attach(Segment.attach(shared.control))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def pages(segment: Segment) -> int:
    """Bytes that are really there."""
    return (SHM / segment.name).stat().st_blocks * 512


def test_what_the_worker_places_the_learner_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tried: list[list[str]]
) -> None:
    world, stand_in = World(), use(monkeypatch, StandIn())
    with session(world, tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        gauge, whole = RingGauge.attach(ring), (pages(ring), pages(bank))
        producer, weights = place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        assert tried == [[RING, BANK]] and stand_in.opened == []  # the worker made them, and opens nothing
        assert (control.worker.memory_device, control.worker.ring_memory) == ("cuda", RING)
        assert pages(ring) < whole[0] / 4 and pages(bank) < whole[1]  # given back, but for headers and evidence
        rows = world.rows(1)
        send(producer, rows)
        assert gauge.used == len(rows)  # the status route's view needs no device
        with pytest.raises(ValueError, match="rows lie in other memory"):
            RingConsumer.attach(ring)

        joined = join(*parts(shared)[:2], control.worker)
        assert stand_in.opened == [RING, BANK]
        assert torch.equal(joined.ring.read(7), rows[:7])
        again = join(*parts(shared)[:2], control.worker)  # the one before was killed
        assert torch.equal(again.ring.read(99), rows[7:])
        tensors = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) + 3 for spec in weights.specs}
        again.bank.publish(2, tensors, {})
        assert all(torch.equal(one, tensors[name]) for name, one in weights.read(2).tensors.items())
    assert not warnings(caplog) and not stand_in.released


def test_what_a_checksum_needs_is_taken_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: list[list[str]]
) -> None:
    use(monkeypatch, StandIn())
    summed: list[tuple[str, int]] = []

    def crc32(piece: Piece, start: int, stop: int, crc: int) -> int:
        summed.append((piece.name, stop - start))
        return 0

    monkeypatch.setattr(Piece, "crc32", crc32)
    with session(World(), tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        _, weights = place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        ((name, size),) = summed
        assert name == BANK and tried
        weights._slots[0].crc32(1, b"")
        assert max(asked for _, asked in summed[1:]) <= size  # no later one needs more


@pytest.mark.parametrize("fault", ["ring_memory", "bank_memory", "elsewhere", "a bug", "late"])
def test_what_fails_leaves_host_memory_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    world, stand_in = World(), use(monkeypatch, StandIn(refuses=fault))
    faults = {name: RuntimeError(f"CUDA error: {name}\nadvice") for name in ("elsewhere", "a bug", "late")}
    create_bank = WeightBank.create

    def try_elsewhere(device: torch.device, names: list[str]) -> None:
        if fault in faults and fault != "late":
            raise faults[fault]

    def make_over(segment: Segment, specs: Any, memory: Any = None) -> WeightBank:
        if memory is not None:  # when the ring is made over already
            raise faults["late"]
        return create_bank(segment, specs)

    monkeypatch.setattr(placement, "try_elsewhere", try_elsewhere)
    if fault == "late":
        monkeypatch.setattr(WeightBank, "create", make_over)
    with session(world, tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        before = pages(ring), pages(bank)
        producer, weights = place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        assert sorted(stand_in.released) == sorted(stand_in.made)  # what was made is freed
        assert (pages(ring), pages(bank)) == before
        assert not (control.worker.memory_device or control.worker.ring_memory or control.worker.bank_memory)
        learner = Learner(shared)
        assert learner.device == CPU
        send(producer, world.rows(1))
        learner.turn()
        assert learner.control.learner.trajectories == 1
        assert weights.published() == 0 and isinstance(producer, RingProducer)
    (said,) = warnings(caplog)
    assert "\n" not in said and "memory of cuda cannot be shared" in said and "POSIX shared memory" in said
    assert (f"(RuntimeError: CUDA error: {fault})" if fault in faults else "CUDA_ERROR_OUT_OF_MEMORY)") in said


def padded(matrix: torch.Tensor) -> torch.Tensor:
    """As vLLM holds it: with rows behind the vocabulary."""
    return torch.cat([matrix, matrix[:5] + 1])


@pytest.mark.parametrize("tied", [False, True])
def test_the_target_is_read_where_it_lies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tried: list[list[str]],
    tied: bool,
) -> None:
    world = World()
    use(monkeypatch, StandIn())
    with session(world, tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        embedding = padded(world.embedding)
        head = HeadTensors(embedding, embedding if tied else padded(world.lm_head))
        lend_target_head(lambda: head, control.worker)
        assert tried[1:] == [[EMBEDDING, EMBEDDING if tied else LM_HEAD]]
        lent = join(ring, bank, control.worker).head
        assert lent is not None
        head = lent_target_head(
            shared.target, lent.embedding, lent.lm_head, torch.float32, tuple(world.embedding.shape)
        )
        assert torch.equal(head.embed_tokens, world.embedding)
        assert torch.equal(head.lm_head, world.embedding if tied else world.lm_head)
        assert head.embed_tokens.data_ptr() == embedding.data_ptr()  # no copy
        assert (head.lm_head is head.embed_tokens) is tied
    assert not warnings(caplog)


@pytest.mark.parametrize("fault", ["embedding_memory", "lm_head_memory", "elsewhere", "a model nobody has seen"])
def test_what_cannot_be_lent_is_copied_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    world, stand_in = World(), use(monkeypatch, StandIn(refuses=fault))
    head = HeadTensors(world.embedding, world.lm_head)

    def try_elsewhere(device: torch.device, names: list[str]) -> None:
        if fault == "elsewhere" and EMBEDDING in names:
            raise NoDeviceMemory("exclusive mode")

    monkeypatch.setattr(placement, "try_elsewhere", try_elsewhere)
    with session(world, tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        lend_target_head(lambda: 1 / 0 if fault.startswith("a model") else head, control.worker)  # type: ignore[arg-type]
        assert control.worker.memory_device and not (control.worker.embedding_memory or control.worker.lm_head_memory)
        assert set(stand_in.released) == set(stand_in.made) - {RING, BANK}
        joined = join(ring, bank, control.worker)
        assert joined.head is None and stand_in.opened == [RING, BANK]
    (said,) = warnings(caplog)
    assert "the learner takes a copy of the target's embedding and lm_head" in said and "\n" not in said


def test_a_model_of_another_kind_lends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tried: list[list[str]]
) -> None:
    stand_in = use(monkeypatch, StandIn())
    with session(World(), tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        place(ring, bank, torch.device("cuda"), control.worker, wanted=True)
        lend_target_head(lambda: None, control.worker)
        assert set(stand_in.made) == {RING, BANK}
    with session(World(), tmp_path) as (shared, _):  # nor does one whose ring and bank lie on the host
        lend_target_head(lambda: pytest.fail("asked for nothing"), parts(shared)[2].worker)
    assert not warnings(caplog)


@pytest.mark.parametrize(("device", "wanted"), [("cpu", True), ("cuda", False)])
def test_nothing_is_tried_where_there_is_no_device_or_it_is_not_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: str, wanted: bool
) -> None:
    with session(World(), tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        producer, _weights = place(ring, bank, torch.device(device), control.worker, wanted)
        assert producer.memory.bytes.device == CPU and not control.worker.memory_device
        RingConsumer.attach(ring), WeightBank.attach(bank)
    assert not warnings(caplog)


def test_on_this_machine_a_gpu_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with session(World(), tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        place(ring, bank, torch.device("cuda"), control.worker, wanted=True)  # the real CudaMemory
    (said,) = warnings(caplog)
    assert "NoDeviceMemory: no CUDA device here" in said


def test_another_process_that_cannot_open_it_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NoDeviceMemory, match=r"another process cannot open it: .*aurora-1-1-0123456789abcdef-gone"):
        probe.try_elsewhere(torch.device("cuda"), ["aurora-1-1-0123456789abcdef-gone"])
    with pytest.raises(NoDeviceMemory, match=r"did not open it within 0\.01 s"):
        probe.try_elsewhere(torch.device("cuda"), [], timeout_s=0.01)


def test_of_a_traceback_the_exception_is_told_and_not_the_advice_behind_it() -> None:
    cuda_error = (
        "[W1130 a warning]\nTraceback (most recent call last):\n  File a, line 1\n    first()\nValueError: no\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n  File a, line 2\n    there.settle()\n    ^^^^\n"
        "torch.AcceleratorError: CUDA error: out of memory\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n\n"
    )
    assert probe.exception_line(cuda_error) == "torch.AcceleratorError: CUDA error: out of memory"
    assert probe.exception_line("a warning\nnothing is shared on cpu\n") == "nothing is shared on cpu"
    assert probe.exception_line("") == ""


def test_a_learner_that_cannot_open_it_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tried: list[list[str]]
) -> None:
    world, stand_in = World(), use(monkeypatch, StandIn())
    with session(world, tmp_path) as (shared, _):
        ring, bank, control = parts(shared)
        place(ring, bank, torch.device("cuda"), control.worker, wanted=True)

        def open_it(name: str) -> Piece:
            raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

        monkeypatch.setattr(stand_in, "open", open_it)
        monkeypatch.setenv("AURORA_SESSION", shared.model_dump_json())
        assert process.main() == 2
    said = capsys.readouterr().err
    assert "cannot open the ring and the bank on cuda (RuntimeError: CUDA error: out of memory)\n" in said


def test_the_worker_places_after_warm_up_and_only_then_may_the_learner_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: list[list[str]]
) -> None:
    stand_in = use(monkeypatch, StandIn())
    with session(World(), tmp_path) as (shared, _):
        wanted = shared.model_copy(update={"on_device": True})
        attachment = Attachment(wanted, StrawRunner(), V2Adapter, torch.device("cuda"))
        assert not stand_in.made and not attachment.control.worker.attached
        attachment._on_step(lambda: pytest.fail("vLLM's warm-up is nobody's traffic"))
        assert not attachment.control.worker.capture_errors
        attachment.start_serving()
        assert list(stand_in.made) == [RING, BANK] and attachment.control.worker.attached and attachment.serving


@pytest.mark.usefixtures("same_every_time")
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_learner_on_a_device_trains_judges_and_publishes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: list[list[str]]
) -> None:
    world, stand_in = World(), use(monkeypatch, StandIn())
    with session(world, tmp_path, discard_weight=0.1) as (shared, _), pretend_device(monkeypatch):
        ring, bank, control = parts(shared)
        producer, weights = place(ring, bank, DEVICE, control.worker, wanted=True)
        head = HeadTensors(padded(world.embedding).to(DEVICE), padded(world.lm_head).to(DEVICE))
        lend_target_head(lambda: head, control.worker)
        learner = Learner(shared)
        assert learner.device == DEVICE and isinstance(learner.drafts.candidate.fc.weight.data, Far)
        assert isinstance(learner.head.lm_head, Far)
        assert learner.head.lm_head.here.data_ptr() == head.lm_head.here.data_ptr()  # type: ignore[attr-defined]
        serve(world, learner, producer, range(24))
        for _turn in range(12):
            learner.turn()
        block = learner.control.learner
        assert not learner.curriculum.fault
        assert block.step >= 24 and block.publishes >= 1, (block.step, block.message)
        version = weights.published()
        published = weights.read(version).tensors["fc.weight"].cpu()
        assert torch.equal(published, learner.drafts.incumbent.fc.weight.detach().cpu())
        again = Learner(shared)  # the one before was killed
        assert again.drafts.version == version and stand_in.opened == [RING, BANK, EMBEDDING, LM_HEAD] * 2
        assert torch.equal(again.drafts.candidate.fc.weight.detach().cpu(), published)
