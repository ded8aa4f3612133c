"""What a swap costs the requests that are being served.

    python -m benchmarks.swap --json benchmarks/results/swap.json

Four greedy requests decode at all times while another process publishes a new version, ``--swaps`` times. Every engine
step is timed. The steps from a publish to its swap, and the one after, count as "around" the swap: in that time the
weights are read, checked and packed in the background. The answers are compared with those of the same requests
without speculation, in the same engine.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.engine import Engine, humaneval_engine
from benchmarks.report import write_report

CONCURRENCY = 4
TOKENS = 64
STEPS_BETWEEN = 12  # quiet steps before the next publish
console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    swaps: Annotated[int, typer.Option(help="how many versions are published")] = 50,
    eager: Annotated[bool, typer.Option(help="vLLM's eager mode instead of its compiled one")] = False,
    seed: int = 0,
) -> None:
    """Measure swap_stall_ratio, swap_changed_outputs and swap_failed_requests."""
    with humaneval_engine(eager) as (engine, prompts):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (engine.session.bank, str(engine.session.draft), seed, theirs)
        publisher = context.Process(target=publish_on_request, args=arguments)
        publisher.start()
        try:
            run = Load(engine, prompts).swap_many(ours, swaps)
            with engine.draft_length("never"):
                plain = engine.generate([prompts[i] for i in sorted(run.answers)], max_tokens=TOKENS)
        finally:
            ours.send(None)
            publisher.join(10)

    expected = dict(zip(sorted(run.answers), (list(output.outputs[0].token_ids) for output in plain), strict=True))
    changed = sum(run.answers[i] != expected[i] for i in expected)
    median = statistics.median(run.quiet)
    quiet_windows = [max(run.quiet[i : i + 4]) for i in range(0, len(run.quiet) - 4, 4)]
    figures = {
        "swap_stall_ratio": max(run.around) / median,
        "swap_stall_ratio_median": statistics.median(run.around) / median,
        "quiet_stall_ratio": max(quiet_windows) / median,  # the same statistic where no swap took place
        "swap_changed_outputs": changed,
        "swap_failed_requests": run.failed,
        "swaps": run.swaps,
        "requests": len(run.answers),
        "exchange_us_median": statistics.median(run.exchange_us),
        "step_ms_median": 1000 * median,
    }
    console.print(figures)
    if json is not None:
        spread = {
            "step_ms": [1000 * min(run.quiet), 1000 * max(run.quiet)],
            "around_ms": [1000 * min(run.around), 1000 * max(run.around)],
        }
        write_report(json, figures, spread, seed, {"eager": eager, "concurrency": CONCURRENCY})
        _plot(run, json.with_suffix(".png"))


class Load:
    """Keeps CONCURRENCY greedy requests decoding, and times every engine step."""

    def __init__(self, engine: Engine, prompts: list[str]) -> None:
        self._engine = engine
        self._core = engine.llm.llm_engine
        self._prompts = prompts
        self._next = 0
        self._running: set[str] = set()
        self.quiet: list[float] = []  # seconds of decode steps while no swap is pending
        self.around: list[float] = []  # seconds of decode steps from a publish to the step after its swap
        self.exchange_us: list[float] = []
        self.answers: dict[int, list[int]] = {}
        self.failed = 0
        self.swaps = 0

    def swap_many(self, publisher: Connection, swaps: int) -> Load:
        for _ in range(2 * STEPS_BETWEEN):
            self._step()
        self.quiet.clear()
        with Progress(console=console) as progress:
            bar = progress.add_task("swaps", total=swaps)
            while self.swaps < swaps:
                for _ in range(STEPS_BETWEEN):
                    self._step(self.quiet)
                version = 2 + self.swaps
                publisher.send(version)
                deadline = time.monotonic() + 30
                while self._engine.control.worker.live_version != version:
                    self._step(self.around)
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"version {version} did not go live: {self._engine.control.worker.refusal}")
                self._step(self.around)
                self.exchange_us.append(self._engine.control.worker.last_swap_stall_us)
                self.swaps += 1
                progress.advance(bar)
                self._engine.drain()
        while self._running:
            self._step(refill=False)
        return self

    def _step(self, times: list[float] | None = None, refill: bool = True) -> None:
        from vllm import SamplingParams

        admitted = False
        while refill and len(self._running) < CONCURRENCY:
            index = self._next % len(self._prompts)
            name = f"{self._next}"
            params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            self._core.add_request(name, self._prompts[index], params)
            self._running.add(name)
            self._next += 1
            admitted = True
        started = time.perf_counter()
        outputs = self._core.step()
        seconds = time.perf_counter() - started
        if times is not None and not admitted:  # a step that also prefills is longer for that reason
            times.append(seconds)
        for output in outputs:
            if output.finished:
                self._running.discard(output.request_id)
                tokens = list(output.outputs[0].token_ids)
                self.failed += output.outputs[0].finish_reason not in ("length", "stop") or len(tokens) != TOKENS
                self.answers[int(output.request_id) % len(self._prompts)] = tokens


def publish_on_request(bank_name: str, draft: str, seed: int, requests: Connection) -> None:
    """The learner's part, in its own process: publish slightly different weights whenever a version is received."""
    from safetensors.torch import load_file

    from aurora_vllm.config import AuroraConfig
    from aurora_vllm.transport.bank import WeightBank
    from aurora_vllm.transport.segment import Segment

    torch.set_num_threads(1)
    os.nice(AuroraConfig().learner_nice)
    bank = WeightBank.attach(Segment.attach(bank_name))
    tensors = load_file(Path(draft) / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    # Made beforehand, so that the steps are measured beside the publishing, not beside the random generator.
    variants = [
        {
            spec.name: tensors[spec.name]
            + 0.02 * tensors[spec.name].std() * torch.randn(spec.shape, generator=generator)
            if tensors[spec.name].is_floating_point()
            else tensors[spec.name]
            for spec in bank.specs
        }
        for _ in range(2)
    ]
    while (version := requests.recv()) is not None:
        bank.publish(version, variants[version % 2], {"why": "benchmark"})


def _plot(run: Load, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for times, label in ((run.quiet, "no swap under way"), (run.around, "around a swap")):
        ordered = sorted(1000 * t for t in times)
        axes.plot(
            ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=f"{label} ({len(ordered)} steps)"
        )
    axes.set_xlabel("decode step, ms")
    axes.set_ylabel("share of steps at most this long")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
