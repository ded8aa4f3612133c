"""The self-check's processes: one for each section, and those for a section's two sides. With `device` "cpu" they use
POSIX shared memory.

Nothing here imports vLLM. Each word of a row encodes the row's number, so torn, lost and repeated rows are detected.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from aurora_vllm.learner.gpu_bound import bound_gpu_memory
from aurora_vllm.parent import end_with_parent
from aurora_vllm.transport.bank import TensorSpec, WeightBank, bank_bytes, weights_bytes
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.cuda import CudaMemory
from aurora_vllm.transport.placement import join
from aurora_vllm.transport.ring import HEADER_BYTES, RingConsumer, RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from aurora_vllm.transport.waits import OwnerGone

Names = tuple[str, str | None]  # of the segment, and of the device memory if there is any
TIMEOUT_S = 120.0
LEAVE_S = 10.0  # for a section to end by itself after its result
STRIDE = 1_000_003  # difference between the words of two consecutive rows


def isolated(limit_s: float, work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a function in a process of its own and return its result, because after a CUDA error the process is unusable.

    The process may start others; none of them is left afterwards. Returns {"error": why} if the function raises, its
    process dies, or ``limit_s`` is exceeded.
    """
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_lead, args=(os.getpid(), theirs, work, args))  # a daemon could not start others
    process.start()
    theirs.close()
    found, why = None, ""
    try:
        found = receive(ours, limit_s)
    except TimeoutError:
        why = f"not done within {limit_s:.0f} s"
    except EOFError:
        pass
    finally:
        if not why:
            wait([process.sentinel], LEAVE_S)
        with suppress(ProcessLookupError):  # before the join: until then its pid is not reused
            assert process.pid is not None  # it was started; group 0 would be our own
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        ours.close()
    return found or {"error": why or f"its process ended with exit code {process.exitcode}"}


def _lead(parent: int, pipe: Connection, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    os.setpgrp()  # processes that it starts are in its group
    end_with_parent(parent)
    try:
        found = work(*args)
    except Exception as error:
        traceback.print_exc()
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    pipe.send(found)


def start(target: Callable[..., None], *args: Any) -> tuple[SpawnProcess, Connection]:
    """Run a function in another process, with one end of a pipe as its last argument. Returns process and other end."""
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_follow, args=(os.getpid(), target, *args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _follow(parent: int, target: Callable[..., None], *args: Any) -> None:
    end_with_parent(parent)  # the parent may be killed
    target(*args)


def receive(pipe: Connection, timeout_s: float = TIMEOUT_S) -> Any:
    """The other process's next message. Raises TimeoutError if there is none in time, EOFError if the process ended."""
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"the other process said nothing for {timeout_s:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise EOFError("the other process ended; why is on stderr") from None


def captured(device: str, forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """Functions that run the forward, and that return its last output. A replayed CUDA graph; on a CPU, plain calls."""
    if device == "cpu":
        return (lambda: None), forward
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first call initialises libraries, and must not be captured
        forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    return graph.replay, lambda: output


def make_ring(device: str, row_bytes: int, capacity: int) -> tuple[RingProducer, Names]:
    if device == "cpu":
        segment = Segment.create("ring", ring_bytes(row_bytes, capacity))
        return RingProducer.create(segment, row_bytes, capacity), (segment.name, None)
    memory = CudaMemory.create("ring_memory", row_bytes * capacity, torch.device(device))
    segment = Segment.create("ring", HEADER_BYTES)
    return RingProducer.create(segment, row_bytes, capacity, memory), (segment.name, memory.name)


def open_ring(names: Names) -> RingConsumer:
    segment, memory = names
    return RingConsumer.attach(Segment.attach(segment), CudaMemory.open(memory) if memory else None)


def make_bank(device: str, specs: list[TensorSpec]) -> tuple[WeightBank, Names]:
    if device == "cpu":
        segment = Segment.create("bank", bank_bytes(specs))
        return WeightBank.create(segment, specs), (segment.name, None)
    memory = CudaMemory.create("bank_memory", weights_bytes(specs), torch.device(device))
    segment = Segment.create("bank", bank_bytes(specs, weights_elsewhere=True))
    return WeightBank.create(segment, specs, memory), (segment.name, memory.name)


def remove(names: Names) -> None:
    """Unlink the segments; also those of a process that was killed."""
    for name in names:
        if name is not None:
            try:
                Segment.attach(name).unlink()
            except FileNotFoundError:
                continue


def words(rows: torch.Tensor, first: int) -> torch.Tensor:
    """The words of rows first, first + 1, … uint8 [n, row_bytes] -> int64 [n, row_bytes / 8]"""
    count, row_bytes = rows.shape
    columns = torch.arange(row_bytes // 8, device=rows.device)
    return columns + ((torch.arange(count, device=rows.device) + first) * STRIDE).unsqueeze(1)


def write_rows(producer: RingProducer, count: int) -> bool:
    """Enqueue and publish the next rows; False if they do not fit now. Does not wait for the device."""
    views = producer.reserve(count)
    if views is None:
        return False
    first = producer.written
    for view in views:
        view.view(torch.int64).copy_(words(view, first), non_blocking=True)
        first += len(view)
    producer.commit()
    return True


def wrong_rows(rows: torch.Tensor, first: int) -> int:
    """How many of these rows are not rows first, first + 1, …"""
    return int((rows.view(torch.int64) != words(rows, first)).any(dim=1).sum())


def produce(device: str, row_bytes: int, capacity: int, batch: int, records: int, pipe: Connection) -> None:
    """The worker: make a ring, send its names, write ``records`` rows (0: without end), and end on a message."""
    producer, names = make_ring(device, row_bytes, capacity)
    if device != "cpu":
        torch.cuda.set_sync_debug_mode("error")  # no host synchronisation in what follows, or this process ends
    pipe.send(names)
    while not records or producer.written < records:
        if not write_rows(producer, min(batch, records - producer.written) if records else batch):
            time.sleep(0)
    pipe.recv()


def consume(names: Names, read: int, pipe: Connection) -> None:
    """The learner: read without end; send (first row, rows, wrong rows) per read, and "gone" if the worker is dead."""
    ring = open_ring(names)
    try:
        while True:
            first = ring.taken
            rows = ring.read(read)
            if len(rows):
                pipe.send((first, len(rows), wrong_rows(rows, first)))
    except OwnerGone:
        pipe.send("gone")


def read_lent(names: list[str], pipe: Connection) -> None:
    """The learner: open these device memories, and send their bytes."""
    pipe.send([CudaMemory.open(name).bytes.tolist() for name in names])


def join_and_read(segments: tuple[str, str, str], pipe: Connection) -> None:
    """The learner at its start: send its device, the names of the bank's tensors and the first number of each of the
    target's two bfloat16 matrices; then how many rows it read, and how many of them are wrong."""
    ring, bank, control = (Segment.attach(name) for name in segments)
    joined = join(ring, bank, ControlBlock.attach(control).worker)
    assert joined.head is not None
    ends = [float(end.view(torch.bfloat16)[0]) for end in (joined.head.embedding, joined.head.lm_head)]
    pipe.send((str(joined.device), [spec.name for spec in joined.bank.specs], ends))
    deadline = time.monotonic() + TIMEOUT_S
    while not len(rows := joined.ring.read(1024)) and time.monotonic() < deadline:
        time.sleep(0.01)
    pipe.send((len(rows), wrong_rows(rows, 0)))


def allocate_beyond(device: str, bound: int, pipe: Connection) -> None:
    """The learner: allocate twice its bound, and send the error's type ("" if there was none)."""
    bound_gpu_memory(bound, torch.device(device))
    try:
        torch.empty(2 * bound, dtype=torch.uint8, device=device)
        pipe.send("")
    except RuntimeError as error:
        pipe.send(type(error).__name__)


def publish(names: Names, versions: list[int], pipe: Connection) -> None:
    """The learner: publish these versions, then send the seconds that each took."""
    segment, memory = names
    opened = CudaMemory.open(memory) if memory else None
    bank = WeightBank.attach(Segment.attach(segment), opened)
    device = torch.device("cpu") if opened is None else opened.device
    seconds = []
    for version in versions:
        tensors = weights(bank.specs, version, device)
        started = time.perf_counter()
        bank.publish(version, tensors, {"why": "self-check"})
        seconds.append(time.perf_counter() - started)
    pipe.send(seconds)


def weights(specs: list[TensorSpec], version: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A version's tensors: small random numbers, the same in every process on this device."""
    generator = torch.Generator(device=device).manual_seed(version)
    return {
        spec.name: torch.randn(spec.shape, generator=generator, device=device, dtype=torch.float32)
        .mul_(spec.shape[-1] ** -0.5)
        .to(spec.dtype)
        for spec in specs
    }
