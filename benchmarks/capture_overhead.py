"""What capture costs: decode tokens/s with capture on over capture off, alternating in one engine.

    python -m benchmarks.capture_overhead --json benchmarks/results/capture_overhead.json

Capture is switched every few decode steps, so that disturbances of the machine affect both sides alike. Both sides
have the same tokens per step, so the ratio of tokens/s is the ratio of step times. (Alternating whole blocks had
quartiles 4 % off.) No learner runs: the ring is emptied between blocks, outside the measured time. Plain decoding (K=0)
and speculation (K=3) are measured at concurrency 1 and 4; the figure is the smallest of the four ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from aurora_vllm.spec_decode.breaker import CircuitBreaker
from benchmarks.engine import Engine, humaneval_engine
from benchmarks.openmp import restart_with_intel_openmp
from benchmarks.report import median_and_spread, write_report

TOKENS = 64  # of each answer
SWITCH_EVERY = 4  # steps
console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    rounds: Annotated[int, typer.Option(help="blocks of requests for each mode and concurrency")] = 12,
    eager: Annotated[bool, typer.Option(help="vLLM's eager mode instead of its compiled one")] = False,
    seed: int = 0,
) -> None:
    """Measure capture_ratio."""
    restart_with_intel_openmp()
    with humaneval_engine(eager) as (engine, prompts):
        ratios = {
            (mode, concurrency): _ratios(engine, prompts, mode, concurrency, rounds)
            for mode in ("never", "always")
            for concurrency in (1, 4)
        }
    names = {"never": "k0", "always": "k3"}
    results = {f"{names[mode]}_c{c}": median_and_spread(values) for (mode, c), values in ratios.items()}
    figures = {"capture_ratio": min(median for median, _ in results.values())}
    figures |= {f"capture_ratio_{name}": median for name, (median, _) in results.items()}
    spread = {f"capture_ratio_{name}": spread for name, (_, spread) in results.items()}
    console.print(figures)
    if json is not None:
        write_report(json, figures, spread, seed, {"rounds": rounds, "eager": eager, "tokens": TOKENS})
        _plot(
            {f"{names[mode]}, concurrency {c}": values for (mode, c), values in ratios.items()},
            json.with_suffix(".png"),
        )


def _ratios(engine: Engine, prompts: list[str], mode: str, concurrency: int, rounds: int) -> list[float]:
    """Median step time without capture over the median with it, for each block of requests."""
    ratios = []
    with engine.draft_length(mode):
        engine.generate(prompts[:concurrency], max_tokens=TOKENS)
        for i in track(range(rounds), f"{mode}, concurrency {concurrency}", console=console):
            seconds = _step_seconds(engine, prompts[concurrency * i : concurrency * (i + 1)], first=bool(i % 2))
            ratios.append(statistics.median(seconds[False]) / statistics.median(seconds[True]))
    return ratios


def _step_seconds(engine: Engine, batch: list[str], first: bool) -> dict[bool, list[float]]:
    """Decode a block of requests, with capture alternating. Returns step times by whether capture was on.

    Only decode steps in which all requests run are counted.

    Args:
        first: whether capture is on in the first steps.
    """
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    for i, prompt in enumerate(batch):
        core.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    core.step()  # the prompts
    step, running = 0, len(batch)
    while running:
        capture = first == (step // SWITCH_EVERY % 2 == 0)
        # With the breaker open, capture does nothing at all. For an opted-out request it would still do some work.
        with nullcontext() if capture else _breaker_open(engine):
            started = time.perf_counter()
            outputs = core.step()
            spent = time.perf_counter() - started
        ended = sum(output.finished for output in outputs)
        if running == len(batch) and not ended and step % SWITCH_EVERY:  # the first step after a switch is warm-up
            seconds[capture].append(spent)
        running -= ended
        step += 1
    engine.let_requests_end()
    engine.drain()
    return seconds


@contextmanager
def _breaker_open(engine: Engine) -> Iterator[None]:
    attachment = engine.attachment
    before = attachment.capture
    attachment.capture = CircuitBreaker("capture, off for this block", limit=0)
    try:
        yield
    finally:
        attachment.capture = before


def _plot(ratios: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.boxplot(list(ratios.values()), tick_labels=list(ratios), orientation="horizontal")
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.axvline(0.98, color="tab:red", linewidth=1, linestyle="--", label="what must hold: 0.98")
    axes.set_xlabel("decode tokens/s, capture on / off")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
