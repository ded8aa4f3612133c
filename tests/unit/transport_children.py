"""The other process in the transport tests. Imports only what a child needs.

Children come from multiprocessing's fork server: it imports torch once, each child is a process of its own and can be
killed. `kill_at_line` is kill -9 at a chosen point: before the n-th line that the transport package executes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from aurora_vllm.transport import segment as segment_module
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingConsumer, RingProducer
from aurora_vllm.transport.segment import Segment

PACKAGE = str(Path(segment_module.__file__).parent)


def start(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Run a function of this module in another process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the fork server's preload looks along its own path
    try:
        process = context.Process(target=target, args=args, daemon=True)
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return process


def finish(process: ForkServerProcess, timeout: float = 30) -> int | None:
    """Wait for a child; its exit code, -9 where it was killed."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the child did not end")
    return process.exitcode


def at_line(n: int, action: Callable[[], object], within: str | tuple[str, ...] = PACKAGE) -> None:
    """Call `action` before the n-th line (from 1) that this thread executes from now on in files whose path begins so.

    Args:
        within: a package's directory, or several files; the transport package unless told.
    """
    left = n

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                action()
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if left > 0 and frame.f_code.co_filename.startswith(within) else None

    sys.settrace(trace)


def kill_at_line(n: int, within: str | tuple[str, ...] = PACKAGE) -> None:
    at_line(n, lambda: os.kill(os.getpid(), signal.SIGKILL), within)


def pattern(index: int, row_bytes: int) -> torch.Tensor:
    """uint8 [row_bytes] that says in each of its words which row it is."""
    return (torch.arange(row_bytes // 8, dtype=torch.int64) + index * 1_000_003).view(torch.uint8)


def write_rows(producer: RingProducer, n: int) -> bool:
    views = producer.reserve(n)
    if views is None:
        return False
    index = producer.written
    for view in views:
        for row in view:
            row.copy_(pattern(index, producer.row_bytes))
            index += 1
    producer.commit()
    return True


def produce(name: str, batches: list[int], kill_at: int = 0) -> None:
    """Write rows until the batches are through; try again where they do not fit."""
    segment = Segment.attach(name)
    if kill_at:
        kill_at_line(kill_at)
    producer = RingProducer.attach(segment)
    for batch in batches:
        while not write_rows(producer, batch):
            time.sleep(0.0002)


def produce_for_ever(name: str) -> None:
    producer = RingProducer.attach(Segment.attach(name))
    while True:
        write_rows(producer, 1 + producer.written % 3)


def consume(name: str, batches: list[int], report: Connection, kill_at: int = 0) -> None:
    """Read; report (first row's index, count) after every read."""
    segment = Segment.attach(name)
    if kill_at:
        kill_at_line(kill_at)
    consumer = RingConsumer.attach(segment)
    for batch in batches:
        rows = consumer.read(batch)
        if len(rows):
            report.send((int(rows[0].view(torch.int64)[0]) // 1_000_003, len(rows)))


def consume_for_ever(name: str, report: Connection) -> None:
    consumer = RingConsumer.attach(Segment.attach(name))
    while True:
        rows = consumer.read(3)
        if len(rows):
            report.send((int(rows[0].view(torch.int64)[0]) // 1_000_003, len(rows)))


def make_segment_and_wait(report: Connection) -> None:
    report.send(Segment.create("test", 4096).name)
    time.sleep(60)


def weights(bank: WeightBank, version: int) -> dict[str, torch.Tensor]:
    return {spec.name: torch.full(spec.shape, version % 120, dtype=spec.dtype) for spec in bank.specs}


def publish(name: str, versions: list[int], kill_at: int = 0) -> None:
    segment = Segment.attach(name)
    bank = WeightBank.attach(segment)
    for version in versions[:-1]:
        bank.publish(version, weights(bank, version), {"version": version})
    tensors = weights(bank, versions[-1])
    if kill_at:
        kill_at_line(kill_at)
    bank.publish(versions[-1], tensors, {"version": versions[-1]})
    sys.settrace(None)


def write_message(name: str, messages: list[str], seconds: float, kill_at: int = 0) -> None:
    control = ControlBlock.attach(Segment.attach(name))
    if kill_at:
        kill_at_line(kill_at)
    end = time.monotonic() + seconds
    while True:
        for message in messages:
            control.worker.message = message
        if time.monotonic() > end:
            return


def record(name: str, times: int, kill_at: int = 0) -> None:
    control = ControlBlock.attach(Segment.attach(name))
    if kill_at:
        kill_at_line(kill_at)
    for i in range(times):
        control.scheduler.record(2 + i // 4, 1, 3, 2, [1, 1, 0])
