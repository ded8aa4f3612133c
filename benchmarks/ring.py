"""The trace ring's speed beside memcpy's.

    python -m benchmarks.ring --json benchmarks/results/ring.json

Two processes: a producer that writes rows as wide as SmolLM2's (9,280 bytes) and a consumer that takes private copies
of them.
Every row is copied twice on its way (into the ring, out of it), on two cores at the same time. The yardstick is one
thread copying the same
number of rows between two buffers of the ring's size (``numpy.copyto``, that is memcpy), so ``ring_over_memcpy``
compares rows through the ring with plain copies of these rows. Rounds alternate.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from aurora_vllm.transport.ring import RingConsumer, RingProducer, ring_bytes
from aurora_vllm.transport.rows import RowLayout
from aurora_vllm.transport.segment import Segment
from benchmarks.report import median_and_spread, write_report

LAYOUT = RowLayout(hidden_size=576, num_aux=3, dtype=torch.float32)
CAPACITY = 4096  # rows: 36 MiB
CHUNK = 256  # rows written, and read, at a time
console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="where the report goes; a plot is put beside it")] = None,
    rounds: Annotated[int, typer.Option(help="measurements of each")] = 9,
    rows: Annotated[int, typer.Option(help="rows a round")] = 200_000,
    seed: int = 0,
) -> None:
    """Measure ring_over_memcpy."""
    torch.set_num_threads(1)
    ring_speeds, memcpy_speeds = [], []
    for _ in track(range(rounds), "ring, memcpy", console=console):
        memcpy_speeds.append(_memcpy_speed(rows))
        ring_speeds.append(_ring_speed(rows))
    ratio, ratio_spread = median_and_spread([a / b for a, b in zip(ring_speeds, memcpy_speeds, strict=True)])
    ring, ring_spread = median_and_spread(ring_speeds)
    memcpy, memcpy_spread = median_and_spread(memcpy_speeds)
    figures = {"ring_over_memcpy": ratio, "ring_gb_per_s": ring / 1e9, "memcpy_gb_per_s": memcpy / 1e9}
    console.print(figures)
    if json is not None:
        spread = {
            "ring_over_memcpy": ratio_spread,
            "ring_gb_per_s": [x / 1e9 for x in ring_spread],
            "memcpy_gb_per_s": [x / 1e9 for x in memcpy_spread],
        }
        write_report(json, figures, spread, seed, {"row_bytes": LAYOUT.row_bytes, "rows": rows, "capacity": CAPACITY})
        _plot(ring_speeds, memcpy_speeds, json.with_suffix(".png"))


def _memcpy_speed(rows: int) -> float:
    """Bytes/s of one thread copying rows between two buffers of the ring's size."""
    source = np.ones((CAPACITY, LAYOUT.row_bytes), dtype=np.uint8)
    target = np.zeros_like(source)
    started = time.perf_counter()
    for i in range(rows // CHUNK):
        at = slice(i * CHUNK % CAPACITY, i * CHUNK % CAPACITY + CHUNK)
        np.copyto(target[at], source[at])
    return rows // CHUNK * CHUNK * LAYOUT.row_bytes / (time.perf_counter() - started)


def _ring_speed(rows: int) -> float:
    """Bytes/s from the first row written to the last row read."""
    segment = Segment.create("bench", ring_bytes(LAYOUT.row_bytes, CAPACITY))
    try:
        producer = RingProducer.create(segment, LAYOUT.row_bytes, CAPACITY)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        consumer = multiprocessing.get_context("spawn").Process(target=consume, args=(segment.name, rows, theirs))
        consumer.start()
        ours.recv()  # it is attached
        source = torch.ones(CHUNK, LAYOUT.row_bytes, dtype=torch.uint8)
        started = time.perf_counter()
        for _ in range(rows // CHUNK):
            while (views := producer.reserve(CHUNK)) is None:
                time.sleep(0)  # a benchmark of throughput waits; the worker never does, it drops
            done = 0
            for view in views:
                view.copy_(source[done : done + len(view)])
                done += len(view)
            producer.commit()
        ours.recv()
        seconds = time.perf_counter() - started
        consumer.join()
    finally:
        segment.unlink()
    return rows // CHUNK * CHUNK * LAYOUT.row_bytes / seconds


def consume(name: str, rows: int, done: Connection) -> None:
    """The consumer: reads until all rows came."""
    torch.set_num_threads(1)
    ring = RingConsumer.attach(Segment.attach(name))
    done.send("attached")
    left = rows // CHUNK * CHUNK
    while left:
        got = len(ring.read(CHUNK))
        left -= got
        if not got:
            time.sleep(0)
    done.send("all")


def _plot(ring: list[float], memcpy: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.5), layout="constrained")
    values = [[x / 1e9 for x in memcpy], [x / 1e9 for x in ring]]
    axes.boxplot(values, tick_labels=["memcpy, one thread", "ring, two processes"], orientation="horizontal")
    axes.set_xlabel("GB/s of rows")
    axes.set_xlim(left=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
