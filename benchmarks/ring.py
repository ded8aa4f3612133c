"""The trace ring's throughput compared with memcpy's.

    python -m benchmarks.ring --json benchmarks/results/ring.json

One process produces rows (metadata, three aux states, last hidden state; SmolLM2's, 9,280 bytes). Another consumes them
by taking private copies. A row is counted once, when it has been consumed.

``ring_over_memcpy`` is bytes/s of rows through the ring over bytes/s of one thread's memcpy between two buffers of the
ring's size. This is the stricter ratio: a row through the ring is copied twice, by two processes that share the memory
bandwidth, and a commit publishes only one step's rows (``--step-rows``: 16 is four requests with three drafts each).
``ring_copies_over_two_memcpys`` compares like with like: bytes copied, in and out, over the bytes that two processes
copy when both do nothing but memcpy. Every round measures all of them, one after the other; a figure is the median of
the rounds' ratios. Other commit sizes are in ``by_rows_per_commit`` and in the plot.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

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
CHUNK = 256  # rows that memcpy copies, and the consumer takes, at a time
COMMITS = (1, 4, 16, 64, 256)  # rows published at a time
console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    rounds: Annotated[int, typer.Option(help="how often everything is measured")] = 9,
    rows: Annotated[int, typer.Option(help="rows per measurement")] = 60_000,
    step_rows: Annotated[int, typer.Option(help="rows per commit for ring_over_memcpy")] = 16,
    seed: int = 0,
) -> None:
    """Measure ring_over_memcpy."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    commits = sorted({*COMMITS, step_rows})
    rates: dict[str, list[float]] = {"memcpy": [], "two_memcpys": [], **{f"ring_{n}": [] for n in commits}}
    with Segment.create("bench", ring_bytes(LAYOUT.row_bytes, CAPACITY)) as segment:
        producer = RingProducer.create(segment, LAYOUT.row_bytes, CAPACITY)
        context = multiprocessing.get_context("spawn")
        partner, theirs = context.Pipe()
        process = context.Process(target=serve_partner, args=(segment.name, theirs), daemon=True)
        process.start()
        theirs.close()
        buffers = _buffers()
        for measured in track(range(-1, rounds), "memcpy, two memcpys, ring", console=console):
            sample = _round(producer, partner, buffers, commits, rows)
            if measured >= 0:  # the first round is warm-up
                for name, rate in sample.items():
                    rates[name].append(rate)
        partner.send(None)
        process.join()
    figures, spread, by_commit = _summary(rates, step_rows, commits)
    console.print(figures)
    if json is not None:
        extra = {
            "row_bytes": LAYOUT.row_bytes,
            "rows_per_commit": step_rows,
            "capacity_rows": CAPACITY,
            "rounds": rounds,
            "by_rows_per_commit": by_commit,
        }
        write_report(json, figures, spread, seed, extra)
        _plot(rates, step_rows, commits, json.with_suffix(".png"))


def _round(
    producer: RingProducer, partner: Connection, buffers: tuple[Any, Any], commits: list[int], rows: int
) -> dict[str, float]:
    """One sample of every rate, in bytes/s."""
    rates = {"memcpy": memcpy_rate(buffers, rows)}
    partner.send(("memcpy", rows))
    partner.recv()  # both start now
    rates["two_memcpys"] = memcpy_rate(buffers, rows) + partner.recv()
    for n in commits:
        count = rows // (1 if n >= 16 else 4) // n * n
        partner.send(("consume", count))
        partner.recv()
        started = time.perf_counter()
        write_rows(producer, count, n)
        partner.recv()  # the last row has been consumed
        rates[f"ring_{n}"] = count * LAYOUT.row_bytes / (time.perf_counter() - started)
    return rates


def write_rows(producer: RingProducer, count: int, n: int) -> None:
    """Publish `count` rows, n at a time. The same n rows are written again and again, so only the ring is measured."""
    rows = torch.zeros(n, LAYOUT.row_bytes, dtype=torch.uint8)
    LAYOUT.meta(rows).random_(0, 1000)
    LAYOUT.aux(rows).normal_()
    LAYOUT.last(rows).normal_()
    for _ in range(count // n):
        while (views := producer.reserve(n)) is None:
            time.sleep(0)  # wait for room; a server's worker never waits, it drops the rows
        done = 0
        for view in views:
            view.copy_(rows[done : done + len(view)])
            done += len(view)
        producer.commit()


def memcpy_rate(buffers: tuple[Any, Any], rows: int) -> float:
    """Bytes/s of this thread copying rows from one buffer to the other (numpy.copyto of contiguous bytes: memcpy)."""
    source, target = buffers
    started = time.perf_counter()
    for i in range(rows // CHUNK):
        at = slice(i * CHUNK % CAPACITY, i * CHUNK % CAPACITY + CHUNK)
        np.copyto(target[at], source[at])
    return rows // CHUNK * CHUNK * LAYOUT.row_bytes / (time.perf_counter() - started)


def serve_partner(name: str, commands: Connection) -> None:
    """The other process: on each command it consumes from the ring or runs memcpy; at None it ends."""
    torch.set_num_threads(1)
    ring = RingConsumer.attach(Segment.attach(name))
    buffers = _buffers()
    while (command := commands.recv()) is not None:
        what, rows = command
        commands.send("ready")
        if what == "memcpy":
            commands.send(memcpy_rate(buffers, rows))
            continue
        while rows:
            got = len(ring.read(CHUNK))
            rows -= got
            if not got:
                time.sleep(0)
        commands.send("done")


def _buffers() -> tuple[Any, Any]:
    """Two buffers of the ring's size with every page touched. uint8 [CAPACITY, row_bytes]"""
    shape = (CAPACITY, LAYOUT.row_bytes)
    return np.full(shape, 1, dtype=np.uint8), np.full(shape, 2, dtype=np.uint8)


def _summary(
    rates: dict[str, list[float]], step_rows: int, commits: list[int]
) -> tuple[dict[str, float], dict[str, list[float]], dict[int, dict[str, float]]]:
    """Figures, their spread, and the medians for every commit size."""
    ring = rates[f"ring_{step_rows}"]
    samples = {
        "ring_over_memcpy": _ratios(ring, rates["memcpy"]),
        "ring_copies_over_two_memcpys": _ratios([2 * rate for rate in ring], rates["two_memcpys"]),
        "ring_gb_per_s": [rate / 1e9 for rate in ring],
        "memcpy_gb_per_s": [rate / 1e9 for rate in rates["memcpy"]],
        "two_memcpys_gb_per_s": [rate / 1e9 for rate in rates["two_memcpys"]],
    }
    summary = {name: median_and_spread(values) for name, values in samples.items()}
    by_commit = {
        n: {
            "ring_gb_per_s": median_and_spread(rates[f"ring_{n}"])[0] / 1e9,
            "ring_over_memcpy": median_and_spread(_ratios(rates[f"ring_{n}"], rates["memcpy"]))[0],
        }
        for n in commits
    }
    return (
        {n: median for n, (median, _) in summary.items()},
        {n: spread for n, (_, spread) in summary.items()},
        by_commit,
    )


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _plot(rates: dict[str, list[float]], step_rows: int, commits: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    spans = {name: median_and_spread([rate / 1e9 for rate in values]) for name, values in rates.items()}
    ring = [spans[f"ring_{n}"] for n in commits]
    axes.plot(commits, [median for median, _ in ring], "o-", color="C0", label="rows through the ring")
    axes.fill_between(commits, [s[0] for _, s in ring], [s[-1] for _, s in ring], color="C0", alpha=0.2, lw=0)
    memcpy, (low, *_, high) = spans["memcpy"]
    axes.axhline(memcpy, color="C1", label="memcpy, one thread")
    axes.axhspan(low, high, color="C1", alpha=0.15, lw=0)
    axes.axhline(spans["two_memcpys"][0] / 2, color="C2", ls="-.", label="memcpy, each of two processes")
    axes.axhline(memcpy / 2, color="0.5", ls=":", label="half of one thread's memcpy (goal)")
    axes.axvline(step_rows, color="0.8", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(commits, [str(n) for n in commits])
    axes.set_xlabel(f"rows of {LAYOUT.row_bytes:,} bytes per commit (the figure: {step_rows})")
    axes.set_ylabel("GB/s (median, smallest to largest)")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
