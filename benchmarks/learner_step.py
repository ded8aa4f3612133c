"""Our EAGLE-3 training step against speculators' on the same batch, weights, unroll length and threads.

    python -m benchmarks.learner_step --json benchmarks/results/learner_step.json

Both train a day-0 draft of SmolLM2-135M, in alternating steps, on real tokens with random states as large as a residual
stream's. Batches are one, two and eight trajectories; a quarter of each trajectory is a prompt. A step is forward,
backward, gradient clipping and AdamW; making the batch is not timed. Figures:

    learner_step_ratio            our rows/s over theirs (median of the rounds) on batches of the learner's size
                                  (``batch_tokens``: two trajectories), in the case where it is smallest
    learner_step_ratio_smallest   the smallest of all cases; each case also has a figure of its own
    ..._head_frozen               the same against their step with ``lm_head`` frozen, which is how speculators trains
                                  EAGLE-3; ours still trains it
    loss_...                      both in float32, first steps from the same weights; ours minus the target's entropy
                                  should be theirs

Their step runs in the fastest way on this CPU (attention, autocast's dtype, torch.compile if asked for), found by a
trial for each shape. speculators_step.py lists the other differences. Theirs attends over all rows of all sequences
under a mask, so on a CPU it learns faster from one sequence per step than from eight.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError, report
from aurora_vllm.learner.day0 import make_day0_draft
from benchmarks.report import median_and_spread, write_report
from benchmarks.speculators_step import Variant, require_speculators
from benchmarks.step_contest import PROMPT, ROWS, SEQUENCES, TTT_LENGTH, Contest
from demo.model import ensure_model

console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    rounds: Annotated[int, typer.Option(help="steps of each side with one trajectory; with more, fewer")] = 9,
    vocabulary: Annotated[list[int], typer.Option(help="sizes of the draft vocabulary")] = [4608, 8192],  # noqa: B006
    threads: Annotated[list[int], typer.Option(help="numbers of threads, the same for both")] = [1, 2],  # noqa: B006
    compiled: Annotated[bool, typer.Option(help="also try torch.compile on their step")] = False,
    seed: int = 0,
) -> None:
    """Measure learner_step_ratio."""
    try:
        version = require_speculators()
    except AuroraError as error:
        sys.exit(report(error))
    target = ensure_model()
    cases: list[dict[str, Any]] = []
    trials: dict[str, dict[str, Any]] = {}
    chosen: dict[int, Variant] = {}
    losses: dict[str, list[float]] = {}
    with TemporaryDirectory() as scratch, Progress(console=console) as progress:
        bar = progress.add_task("", total=len(vocabulary) * len(SEQUENCES) * len(threads))
        for size in vocabulary:
            contest = Contest(target, make_day0_draft(target, Path(scratch) / str(size), size), seed)
            torch.set_num_threads(max(threads))
            if not losses:
                losses = contest.losses(contest.batch(1))
            for sequences in SEQUENCES:
                batch = contest.batch(sequences)
                if sequences not in chosen:
                    progress.update(bar, description=f"{sequences} x {ROWS}: choosing their variant")
                    chosen[sequences], trials[f"{sequences}x{ROWS}"] = contest.choose(batch, compiled)
                for count in threads:
                    progress.update(bar, description=f"{sequences} x {ROWS}, vocabulary {size}, {count} threads")
                    torch.set_num_threads(count)
                    seconds, memory = contest.run(batch, chosen[sequences], rounds_of(sequences, rounds))
                    cases.append(
                        {
                            "name": f"{sequences}x{ROWS}_d{size}_{count}t",
                            "rows": sequences * ROWS,
                            "speculators": chosen[sequences].name,
                            "rounds": rounds_of(sequences, rounds),
                            **case_figures(seconds, sequences * ROWS),
                            "peak_memory_mib": memory,
                        }
                    )
                    progress.advance(bar)
    figures, spread = summary(cases)
    figures |= {"loss_ours": losses["ours"][-1], "loss_theirs": losses["theirs"][-1]}
    figures["loss_largest_difference"] = max(
        abs(ours - theirs) for ours, theirs in zip(losses["ours"], losses["theirs"], strict=True)
    )
    console.print(figures)
    if json is not None:
        extra = {
            "speculators": version,
            "ttt_length": TTT_LENGTH,
            "prompt_rows": f"{PROMPT} of {ROWS}",
            "cases": cases,
            "trials_of_their_variants": trials,
            "losses_of_first_steps": losses,
        }
        write_report(json, figures, spread, seed, extra)
        _plot(cases, json.with_suffix(".png"))


def rounds_of(sequences: int, rounds: int) -> int:
    """Rounds of a case: fewer for more sequences, but at least three unless fewer are asked for."""
    return min(rounds, max(3, rounds // sequences))


def case_figures(seconds: dict[str, list[float]], rows: int) -> dict[str, Any]:
    """Medians and spreads of a case.

    Args:
        seconds: times of each side's steps, in order.
        rows: of a step.
    """
    result: dict[str, Any] = {}
    for name, ours_over in (("ratio", "theirs"), ("ratio_head_frozen", "theirs_head_frozen")):
        pairs = zip(seconds[ours_over], seconds["ours"], strict=True)
        result[name], result[f"{name}_spread"] = median_and_spread([theirs / ours for theirs, ours in pairs])
    for name, samples in seconds.items():
        median, spread = median_and_spread([rows / one for one in samples])
        result[f"rows_per_s_{name}"], result[f"rows_per_s_{name}_spread"] = median, spread
    return result


def summary(cases: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures and spread: each case's ratios, the smallest of all, and the smallest with the learner's batch size."""
    figures: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    own = [case for case in cases if case["rows"] == AuroraConfig().batch_tokens]
    for key in ("ratio", "ratio_head_frozen"):
        worst, worst_own = (min(some, key=lambda case: case[key]) for some in (cases, own))
        named = [("", worst_own), ("_smallest", worst), *((f"_{case['name']}", case) for case in cases)]
        for suffix, case in named:
            figures[f"learner_step_{key}{suffix}"] = case[key]
            spread[f"learner_step_{key}{suffix}"] = case[f"{key}_spread"]
    return figures, spread


def _plot(cases: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for i, (key, label) in enumerate((("ratio", "equal work"), ("ratio_head_frozen", "theirs with lm_head frozen"))):
        medians = [case[key] for case in cases]
        low = [case[key] - case[f"{key}_spread"][1] for case in cases]
        high = [case[f"{key}_spread"][2] - case[key] for case in cases]
        axes.bar([x + 0.4 * i for x in range(len(cases))], medians, 0.4, yerr=[low, high], label=label, capsize=2)
    axes.axhline(1, color="grey", linewidth=1)
    axes.axhline(2, color="grey", linewidth=1, linestyle="--")
    names = [case["name"].replace("_", "\n") for case in cases]
    axes.set_xticks([x + 0.2 for x in range(len(cases))], names, fontsize="small")
    axes.set_ylabel("our rows/s over speculators'")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
