"""The ring and the bank over memory where work is only enqueued; and what of the CUDA memory needs no GPU."""

from __future__ import annotations

import ctypes
import gc
import weakref
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.transport import cuda, placement, waits
from aurora_vllm.transport.bank import TensorSpec, TornPublish, WeightBank, bank_bytes, weights_bytes
from aurora_vllm.transport.cuda import CudaMemory, NoDeviceMemory, tensor_over
from aurora_vllm.transport.cuda_description import Description
from aurora_vllm.transport.ring import HEADER_BYTES, RingConsumer, RingGauge, RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from aurora_vllm.transport.waits import OwnerGone, blaming, wait_for_this_stream, wait_until
from tests.unit.transport_children import pattern, write_rows

ROW = 192
SPECS = [TensorSpec("a", (3, 5), torch.float32), TensorSpec("d2t", (7,), torch.int64)]


class Device:
    """Memory of a device that does nothing before somebody waits for it."""

    def __init__(self, size: int) -> None:
        self.memory = torch.zeros(size, dtype=torch.uint8)
        self.enqueued: deque[torch.Tensor] = deque()

    def run(self) -> None:
        while self.enqueued:
            self.memory.copy_(self.enqueued.popleft())


class Side:
    """One process's view: what it writes reaches the device when it has been handed over and somebody waited."""

    def __init__(self, device: Device, look: Callable[[], object] = lambda: None) -> None:
        self.shared = device
        self.bytes = device.memory.clone()
        self.calls: list[tuple[str, object]] = []
        self.look = look  # what others can see at the time of the call

    def hand_over(self) -> None:
        self.calls.append(("hand_over", self.look()))
        self.shared.enqueued.append(self.bytes.clone())

    def take_over(self) -> None:
        self.calls.append(("take_over", self.look()))
        self.shared.run()
        self.bytes.copy_(self.shared.memory)

    def settle(self) -> None:
        self.calls.append(("settle", self.look()))

    def crc32(self, start: int, stop: int, crc: int) -> int:
        return zlib.crc32(bytes(self.bytes[start:stop].tolist()), crc)


@settings(max_examples=30)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=40))
def test_rows_are_whole_where_writes_are_only_enqueued(steps: list[tuple[bool, int]]) -> None:
    capacity = 5
    device = Device(ROW * capacity)
    with Segment.create("ring", HEADER_BYTES) as segment:
        producer = RingProducer.create(segment, ROW, capacity, Side(device))
        consumer = RingConsumer.attach(segment, Side(device))
        index = 0
        for write, n in steps:
            if write:
                write_rows(producer, n)
            else:
                for row in consumer.read(n):
                    assert torch.equal(row, pattern(index, ROW))
                    index += 1


def test_the_order_of_words_and_waits() -> None:
    device = Device(ROW * 4)
    with Segment.create("ring", HEADER_BYTES) as segment:
        gauge: list[RingGauge] = []
        sides = [Side(device, lambda: (gauge[0].written, gauge[0].used)) for _ in range(2)]
        producer = RingProducer.create(segment, ROW, 4, sides[0])
        consumer = RingConsumer.attach(segment, sides[1])
        gauge.append(RingGauge.attach(segment))
        write_rows(producer, 3)
        assert sides[0].calls == [("hand_over", (0, 0))]  # before anybody can see the rows
        assert gauge[0].used == 3
        assert len(consumer.read(9)) == 3
        assert sides[1].calls == [("take_over", (3, 3)), ("settle", (3, 3))]  # before their room is free again
        assert producer.free() == 4
        assert sides[0].calls == [("hand_over", (0, 0))]  # the producer waits for nothing


def test_a_bank_waits_before_it_publishes_and_the_reader_never() -> None:
    device = Device(weights_bytes(SPECS))
    with Segment.create("bank", bank_bytes(SPECS, weights_elsewhere=True)) as segment:
        shared = Side(device)
        learner = WeightBank.create(segment, SPECS, shared)
        reader = Side(device)
        reader.bytes = shared.bytes  # what was settled is there for all
        worker = WeightBank.attach(segment, reader)
        shared.look = worker.published
        for version in (4, 9, 11, 12):
            tensors = {"a": torch.full((3, 5), float(version)), "d2t": torch.arange(7) * version}
            learner.publish(version, tensors, {"why": version})
            publication = worker.read(version)
            assert publication.evidence == {"why": version}
            assert all(torch.equal(publication.tensors[name], tensor) for name, tensor in tensors.items())
            assert publication.still_valid()
        assert shared.calls == [("settle", seen) for seen in (0, 4, 9, 11)]
        assert reader.calls == []
        shared.bytes[0] ^= 1
        torn = [version for version in (9, 11, 12) if _torn(worker, version)]
        assert len(torn) == 1


def _torn(bank: WeightBank, version: int) -> bool:
    try:
        bank.read(version)
    except TornPublish:
        return True
    return False


def test_memory_that_is_not_given_or_too_small() -> None:
    device = Device(ROW * 4)
    with Segment.create("ring", HEADER_BYTES) as segment:
        with pytest.raises(ValueError, match="5 rows of 192 bytes do not fit"):
            RingProducer.create(segment, ROW, 5, Side(device))
        RingProducer.create(segment, ROW, 4, Side(device))
        assert RingGauge.attach(segment).capacity == 4
        with pytest.raises(ValueError, match="rows lie in other memory, which is to be given"):
            RingConsumer.attach(segment)
        with pytest.raises(ValueError, match="too small"):
            RingConsumer.attach(segment, Side(Device(ROW)))
    with Segment.create("ring", ring_bytes(ROW, 4)) as segment:
        RingProducer.create(segment, ROW, 4)
        with pytest.raises(ValueError, match="behind its header, nowhere else"):
            RingConsumer.attach(segment, Side(device))
    with Segment.create("bank", bank_bytes(SPECS, weights_elsewhere=True)) as segment:
        with pytest.raises(ValueError, match="too small"):
            WeightBank.create(segment, SPECS, Side(Device(64)))
        with pytest.raises(ValueError, match="weights lie in other memory, which is to be given"):
            WeightBank.attach(segment)


def test_a_description_comes_back() -> None:
    given = Description(3 << 20, 5 << 9, "a" * 36, b"\0m" * 32, b"e\0" * 32)
    with Segment.create("device", 4096) as segment:
        with pytest.raises(ValueError, match="describes no device memory"):
            Description.read(segment)
        given.write(segment)
        assert Description.read(segment) == given


def test_memory_of_a_dead_process_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "owner_is_alive", lambda name: False)
    with Segment.create("device", 4096) as segment:
        Description(64, 0, "a" * 36, b"m" * 64, b"e" * 64).write(segment)
        with pytest.raises(OwnerGone, match="its process is dead"):
            CudaMemory.open(segment.name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(NoDeviceMemory, match="no CUDA device here"):
        CudaMemory.create("device", 64, torch.device("cuda"))
    with pytest.raises(NoDeviceMemory, match="no CUDA device here"):
        CudaMemory.lend("device", torch.zeros(4))
    with Segment.create("device", 4096) as segment:
        Description(64, 0, "a" * 36, b"m" * 64, b"e" * 64).write(segment)
        with pytest.raises(NoDeviceMemory, match=r"the GPU a+ is not visible"):
            CudaMemory.open(segment.name)


def test_the_driver_s_calls_find_torch_s_context(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", made.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(cuda.cuda_driver, "use_primary_context", made.append)
    assert cuda._make_current(torch.device("cuda")) == torch.device("cuda", 3)
    assert cuda._make_current(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert made == [torch.device("cuda"), 3, torch.device("cuda", 1), 1]


def test_what_was_made_can_be_opened_though_its_maker_forgot_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch destroys an event with its last reference, and a learner may come at any time."""

    class Event:
        def __init__(self, interprocess: bool) -> None:
            assert interprocess

        def ipc_handle(self) -> bytes:
            return b"e" * 64

        def record(self, stream: object) -> None: ...
        def wait(self, stream: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: object())
    monkeypatch.setattr(cuda, "_make_current", lambda device: device)
    monkeypatch.setattr(cuda, "_uuid", lambda device: "a" * 36)
    monkeypatch.setattr(cuda.cuda_driver, "export", lambda pointer: (b"m" * 64, 0))
    monkeypatch.setattr(placement, "memory_for", lambda device: CudaMemory)
    monkeypatch.setattr(placement, "try_elsewhere", lambda device, names: None)
    worker = SimpleNamespace(memory_device="cuda:0", embedding_memory="", lm_head_memory="")
    tensors = [torch.arange(8.0), torch.arange(6.0)]
    held = [weakref.ref(tensor) for tensor in tensors]
    placement.lend_target_head(lambda: placement.HeadTensors(*tensors), worker)  # type: ignore[arg-type]
    tensors.clear()
    gc.collect()
    names = worker.embedding_memory, worker.lm_head_memory
    events = [weakref.ref(CudaMemory._made[name]._event) for name in names]
    assert all(event() is not None for event in events) and all(tensor() is not None for tensor in held)
    for name in names:
        CudaMemory._made[name].release()
    gc.collect()
    assert not any(event() is not None for event in events) and not any(name in CudaMemory._made for name in names)


def on_a_device(segment: Segment, content: bytearray, event: object = None) -> CudaMemory:
    """Another process's device memory, as far as a CPU can be one."""
    pointer = ctypes.addressof((ctypes.c_ubyte * len(content)).from_buffer(content))
    return CudaMemory(segment, torch.device("cpu"), pointer, len(content), event, owned=False)  # type: ignore[arg-type]


def test_a_checksum_is_of_the_bytes_and_takes_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(i * 7 % 251 for i in range(10_000))
    pinned: list[bool] = []
    waited: list[torch.device] = []
    empty = torch.empty

    def make(*size: int, pin_memory: bool, dtype: torch.dtype) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*size, dtype=dtype)

    with Segment.create("device", 4096) as segment:
        memory = on_a_device(segment, content)
        monkeypatch.setattr(torch, "empty", make)
        monkeypatch.setattr(cuda, "wait_for_this_stream", waited.append)
        with torch.inference_mode():  # as whatever vLLM is in when it has warmed up
            memory.crc32(0, 9_999, 0)
        assert memory.crc32(0, 9_999, 0) == zlib.crc32(content[:9_999])
        pinned.clear()
        waited.clear()
        for device in (torch.device("cpu"), torch.device("cuda:0")):
            memory.device, memory._on_host = device, memory._on_host[:0]
            crc = 5
            for start, stop in ((0, 4096), (4096, 8192), (8192, 10_000), (0, 4096)):
                crc = memory.crc32(start, stop, crc)
            assert crc == zlib.crc32(content[:4096], zlib.crc32(content, 5))
            content[77] ^= 1  # the buffer stays, what was in it does not
    assert pinned == [False, True] and waited == [torch.device("cpu")] * 4 + [torch.device("cuda:0")] * 4


def test_a_wait_for_a_stream_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            calls.append(blocking)

        def record(self, stream: object) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    wait_for_this_stream(torch.device("cpu"))
    assert not calls
    wait_for_this_stream(torch.device("cuda:1"))
    assert calls == [True, "the stream of cuda:1", "waited"]


@pytest.mark.parametrize("call", ["take_over", "settle"])
@pytest.mark.parametrize("lives", [False, True])
def test_what_fails_on_memory_of_a_dead_owner_says_that_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, call: str, lives: bool
) -> None:
    class Event:
        def fail(self, stream: object) -> None:
            raise RuntimeError("CUDA error: invalid resource handle\nadvice")

        wait = record = fail

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: object())
    monkeypatch.setattr(cuda, "owner_is_alive", lambda name: lives)
    monkeypatch.setattr(waits, "GRACE_S", 0.05)
    with Segment.create("device", 4096) as segment:
        memory = on_a_device(segment, bytearray(64), Event())
        with pytest.raises(RuntimeError) as raised:
            getattr(memory, call)()
    assert (type(raised.value), "\n" in str(raised.value)) == ((RuntimeError, True) if lives else (OwnerGone, False))


def test_a_tensor_over_given_memory() -> None:
    buffer = ctypes.create_string_buffer(64)
    tensor = tensor_over(ctypes.addressof(buffer), 64, torch.device("cpu"))
    tensor[:3] = torch.tensor([7, 8, 9])
    assert (tensor.shape, tensor.dtype) == ((64,), torch.uint8)
    assert buffer.raw[:4] == b"\x07\x08\x09\x00"


def test_waiting_ends_with_the_work_or_with_the_owner() -> None:
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), lambda: True)
    late = iter([False] * 3 + [True])
    wait_until(lambda: next(late), lambda: False, grace_s=5)  # done after the owner's death is done
    with pytest.raises(OwnerGone):
        wait_until(lambda: False, lambda: False, grace_s=0.01)


def test_a_failure_is_the_owner_s_where_it_dies_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "GRACE_S", 0.05)
    dying = iter([True, True, False])
    with pytest.raises(OwnerGone, match=r"died: CUDA error: unknown error$"), blaming(lambda: next(dying)):
        raise RuntimeError("CUDA error: unknown error\nadvice")
    with pytest.raises(OwnerGone, match="as it was"), blaming(lambda: True):
        raise OwnerGone("as it was")
    with pytest.raises(RuntimeError) as raised, blaming(lambda: True):
        raise RuntimeError("a bug")
    assert type(raised.value) is RuntimeError
    with pytest.raises(TypeError), blaming(lambda: False):
        raise TypeError("another bug")
