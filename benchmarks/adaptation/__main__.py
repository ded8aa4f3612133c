"""Does it pay? A server that learns, against plain vLLM, n-gram, suffix decoding and a draft that stopped learning.

    python -m benchmarks.adaptation --json benchmarks/results/adaptation.json
    python -m benchmarks.results_page                                            # docs/results.md from it

Takes about 55 minutes on 2 cores. Every arm is a server. vLLM's own benchmark client sends them the same prompts with
the same seed, one arm after the other, window after window. The JSON is written after every window, so an interrupted
run keeps its results. ``--smoke`` takes a minute and shows only that everything works.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from aurora_vllm.errors import AuroraError, report, unknown
from benchmarks.adaptation.arms import arms as all_arms
from benchmarks.adaptation.arms import missing
from benchmarks.adaptation.figures import Window, figures, table
from benchmarks.adaptation.plan import ARMS, SMOKE, WORKLOADS, Sizes, Slot, make_plan
from benchmarks.adaptation.plot import plot
from benchmarks.adaptation.prompts import FILE, domains, from_file
from benchmarks.adaptation.run import Run
from benchmarks.deeper import deepened
from benchmarks.report import write_report
from demo.fleet import Fleet, failure_told
from demo.model import ensure_model
from demo.serving import ENVIRONMENT
from demo.signals import end_on_signals


def main(
    json: Annotated[Path, typer.Option(help="file for the report; plots and logs are written beside it")] = Path(
        "build/bench/adaptation.json"
    ),
    workloads: Annotated[str, typer.Option(help="workloads to run, separated by commas")] = ",".join(WORKLOADS),
    arms: Annotated[str, typer.Option(help="arms to run, separated by commas")] = ",".join(ARMS),
    prompts: Annotated[
        Path | None,
        typer.Option(help='file of prompts to use instead, one {"prompt": ...} or {"turns": [...]} per line'),
    ] = None,
    static_draft: Annotated[
        Path | None, typer.Option(help="EAGLE-3 draft of the static arm [default: what aurora learned]")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="requests per window")] = Sizes.window,
    answer_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = Sizes.answer_tokens,
    learn_windows: Annotated[int, typer.Option(min=0, help="windows of day0 before it is measured")] = (
        Sizes.learn_windows
    ),
    measure_windows: Annotated[int, typer.Option(min=0, help="measured windows of day0 at each concurrency")] = (
        Sizes.measure_windows
    ),
    domain_windows: Annotated[int, typer.Option(min=1, help="windows of each domain after a shift")] = (
        Sizes.domain_windows
    ),
    other_windows: Annotated[
        int, typer.Option(min=0, help="windows of mixed and of sampled; crowd gets twice as many")
    ] = Sizes.other_windows,
    plain_every: Annotated[int, typer.Option(min=1, help="plain vLLM gets every so many learning windows")] = (
        Sizes.plain_every
    ),
    idle_s: Annotated[
        int, typer.Option(min=0, help="seconds without traffic before measuring, in which the learner catches up")
    ] = Sizes.idle_s,
    seed: Annotated[int, typer.Option(help="of the order of the prompts, and of sampling")] = 0,
    deeper: Annotated[
        int, typer.Option(min=0, help="layers to add to the target, which change only how long its step takes")
    ] = 0,
    eager: Annotated[bool, typer.Option(help="no compilation, for all arms")] = False,
    smoke: Annotated[bool, typer.Option(help="only plain vLLM and aurora, eager, with tiny windows")] = False,
) -> None:
    """Measure worst_window_ratio, day0_speedup_c1, day0_speedup_c4, shift_speedup, k0_ratio and over_suffix."""
    end_on_signals()
    sizes = Sizes(
        window, answer_tokens, learn_windows, measure_windows, domain_windows, other_windows, plain_every, idle_s
    )
    if smoke:
        sizes, workloads, arms, eager = SMOKE, "day0", "plain,aurora", True
    try:
        names = _names("arm", arms, ARMS)
        if prompts is not None:
            found, absent, wanted = {FILE: from_file(prompts)}, missing(), [FILE]
        else:
            found, without = domains(seed)
            absent, wanted = missing() | without, _names("workload", workloads, WORKLOADS)
        slots = make_plan(wanted, sizes, found, [name for name in names if name not in absent], seed)
        if static_draft is not None and not static_draft.is_dir():
            raise AuroraError(f"--static-draft {static_draft} is not a directory", "give an EAGLE-3 draft")
        if not slots:
            raise AuroraError("nothing to measure", "choose more arms or workloads")
    except AuroraError as error:
        raise SystemExit(report(error)) from None
    _measure(slots, sizes, names, absent, json, static_draft, deeper, eager, seed)


def _measure(
    slots: list[Slot], sizes: Sizes, names: list[str], absent: dict[str, str], json: Path, static_draft: Path | None,
    deeper: int, eager: bool, seed: int,
) -> None:  # fmt: skip
    console = Console()
    complete = False
    described = all_arms(Path("CHECKPOINTS"), static_draft or Path("DRAFT"))  # without names of temporary directories

    def write(windows: list[Window]) -> None:
        values, spread = figures(windows)
        extra: dict[str, Any] = {
            "complete": complete, "absent": absent, "sizes": asdict(sizes), "deeper": deeper, "eager": eager,
            "arms": {name: asdict(arm) for name, arm in described.items() if name in names},
            "table": table(windows), "windows": [asdict(window) for window in windows],
        }  # fmt: skip
        write_report(json, values, spread, seed, extra)

    with TemporaryDirectory(prefix="adaptation-") as scratch:
        checkpoints, exported = Path(scratch) / "checkpoints", Path(scratch) / "static"
        available = all_arms(checkpoints, static_draft or exported)
        fleet = Fleet(ENVIRONMENT, json.parent / "adaptation-logs")
        run = Run(
            slots, sizes, seed, {name: available[name] for name in names}, absent, fleet,
            deepened(ensure_model(), deeper), ("--enforce-eager",) if eager else (), checkpoints,
            None if static_draft else exported, console, write,
        )  # fmt: skip
        try:
            with failure_told(console, "the benchmark", f"{json.parent}/adaptation-logs"):
                run.run()
                complete = True
        finally:
            if run.windows:
                write(run.windows)
                plot(run.windows, {name: arm.label for name, arm in available.items()}, json)
                console.print(figures(run.windows)[0])
                console.print(f"written: {json}", highlight=False)


def _names(kind: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise AuroraError(unknown(f"there is no {kind} {name!r}", name, known))
    return names


if __name__ == "__main__":
    typer.run(main)
