"""The self-check's ring between two processes: every row whole and in order, also where one side is killed."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import gpu_processes as processes


def ring_integrity(device: str, records: int, row_bytes: int, capacity: int, batch: int) -> dict[str, Any]:
    """Another process writes as fast as it can, this one reads and looks at every byte."""
    process, pipe = processes.start(processes.produce, device, row_bytes, capacity, batch, records)
    names = pipe.recv()
    ring, wrong, started = processes.open_ring(names), 0, time.perf_counter()
    while ring.taken < records and process.is_alive():
        first = ring.taken
        wrong += processes.wrong_rows(ring.read(capacity // 2), first)
    seconds = time.perf_counter() - started
    if process.is_alive():
        pipe.send("done")
    process.join()
    processes.remove(names)
    through = {"seconds": seconds, "checked_gb_per_s": ring.taken * row_bytes / seconds / 1e9}
    return {"rows": ring.taken, "expected_rows": records, "row_bytes": row_bytes, "wrong_rows": wrong} | through


def kill_recovery(device: str, row_bytes: int, capacity: int) -> dict[str, bool]:
    """kill -9 of the learner and of the worker, each in the middle of its work; then a new one."""
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
    names = orders.recv()
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
    """Write and let the other side read so many rows; whether all it reported was whole and in order."""
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
    """What the learner still reports is whole; on a GPU it either comes to an end or says that its worker is gone."""
    good = True
    while pipe.poll(5 if device != "cpu" else 0.5):
        try:
            said = pipe.recv()
        except EOFError:  # it fell over its worker's death
            return False
        if said == "gone":
            return good
        good &= said[2] == 0
    return good
