"""The self-check of the ring between two processes: every row is whole and in order, even if one side is killed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.segment import Segment
from benchmarks import gpu_processes as processes
from benchmarks.gpu_timing import elapsed_us, percentile


def ring_integrity(device: str, records: int, row_bytes: int, capacity: int, batch: int) -> dict[str, Any]:
    """Another process writes as fast as it can; this one reads and checks every byte."""
    process, pipe = processes.start(processes.produce, device, row_bytes, capacity, batch, records)
    names = processes.receive(pipe)
    ring, wrong, started = processes.open_ring(names), 0, time.perf_counter()
    while ring.taken < records and process.is_alive() and time.perf_counter() < started + processes.TIMEOUT_S:
        first = ring.taken
        wrong += processes.wrong_rows(ring.read(capacity // 2), first)
    seconds = time.perf_counter() - started
    if process.is_alive():
        pipe.send("done")
    process.join(10)
    process.kill()
    processes.remove(names)
    through = {"seconds": seconds, "checked_gb_per_s": ring.taken * row_bytes / seconds / 1e9}
    return {"rows": ring.taken, "expected_rows": records, "row_bytes": row_bytes, "wrong_rows": wrong} | through


def ring_bandwidth(device: str, row_bytes: int, commits: Sequence[int], rounds: int = 20) -> dict[str, Any]:
    """Copy batches into the ring and publish them, against the same copies into a tensor. GB/s by rows per commit."""
    found: dict[str, Any] = {"gb_per_s": {}, "copy_gb_per_s": {}, "ratio": {}}
    for rows in commits:
        capacity = rows * 16
        producer, names = processes.make_ring(device, row_bytes, capacity)
        consumer = RingConsumer(Segment.attach(names[0]), producer.memory if names[1] else None)
        source = torch.ones((rows, row_bytes), dtype=torch.uint8, device=device)
        plain = torch.empty((capacity, row_bytes), dtype=torch.uint8, device=device)

        def through_the_ring(rows: int = rows, producer: Any = producer, source: torch.Tensor = source) -> None:
            for _ in range(16):
                for view in producer.reserve(rows) or ():
                    view.copy_(source[: len(view)], non_blocking=True)
                producer.commit()

        def into_a_tensor(rows: int = rows, plain: torch.Tensor = plain, source: torch.Tensor = source) -> None:
            for i in range(16):
                plain[i * rows : (i + 1) * rows].copy_(source, non_blocking=True)

        ring_us, copy_us = [], []
        for _ in range(rounds):
            ring_us.append(elapsed_us(device, through_the_ring)[1])
            copy_us.append(elapsed_us(device, into_a_tensor)[1])
            consumer.read(capacity)
        processes.remove(names)
        size, ring, copy = capacity * row_bytes, percentile(ring_us, 0.5), percentile(copy_us, 0.5)
        found["gb_per_s"][str(rows)] = size / ring / 1e3
        found["copy_gb_per_s"][str(rows)] = size / copy / 1e3
        found["ratio"][str(rows)] = copy / ring
    return found


def kill_recovery(device: str, row_bytes: int, capacity: int) -> dict[str, bool]:
    """Kill (-9) the learner, then the worker, in the middle of work; each time start new processes."""
    producer, names = processes.make_ring(device, row_bytes, capacity)
    learner, pipe = processes.start(processes.consume, names, 7)
    seen = _feed(producer, pipe, 5 * capacity)
    learner.kill()
    learner.join()
    started = time.perf_counter()
    while processes.write_rows(producer, 1):
        pass
    never_waited = time.perf_counter() - started < 5
    again, pipe = processes.start(processes.consume, names, 7)
    seen_again = _feed(producer, pipe, capacity)
    again.kill()
    again.join()
    processes.remove(names)

    worker, orders = processes.start(processes.produce, device, row_bytes, capacity, 3, 0)
    names = processes.receive(orders)
    learner, pipe = processes.start(processes.consume, names, 7)
    first_rows = _wait_for_rows(pipe, 3 * capacity)
    worker.kill()
    worker.join()
    after = _after_the_worker(device, pipe)
    learner.kill()
    learner.join()
    processes.remove(names)
    anew = ring_integrity(device, 4 * capacity, row_bytes, capacity, 3)
    return {
        "learner_killed_rows_whole": seen,
        "worker_never_waited_for_a_dead_learner": never_waited,
        "new_learner_went_on": seen_again,
        "worker_killed_rows_whole": first_rows and after,
        "new_pair_works": anew["wrong_rows"] == 0 and anew["rows"] == 4 * capacity,
    }


def _feed(producer: Any, pipe: Any, rows: int) -> bool:
    """Write until the other side has read so many rows. Returns whether all of them were whole and in order."""
    seen, last, good, deadline = 0, None, True, time.monotonic() + 120
    while seen < rows and time.monotonic() < deadline:
        processes.write_rows(producer, 2)
        while pipe.poll():
            first, count, wrong = pipe.recv()
            good &= wrong == 0 and last in (None, first)
            last = first + count
            seen += count
    return good and seen >= rows


def _wait_for_rows(pipe: Any, rows: int) -> bool:
    seen, good = 0, True
    while seen < rows and pipe.poll(120):
        _, count, wrong = pipe.recv()
        seen += count
        good &= wrong == 0
    return good and seen >= rows


def _after_the_worker(device: str, pipe: Any) -> bool:
    """Whether all rows that the learner still reports are whole. On a GPU it must not crash when its worker is gone."""
    good = True
    while pipe.poll(5 if device != "cpu" else 0.5):
        try:
            said = pipe.recv()
        except EOFError:  # it crashed because its worker died
            return False
        if said == "gone":
            return good
        good &= said[2] == 0
    return good
