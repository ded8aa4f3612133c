"""How fast the draft learns: recorded traffic, replayed through learners that differ in one respect each.

    python -m benchmarks.learning --json benchmarks/results/learning.json

Each trajectory is scored before anything trains on it (prequential acceptance length: K=3, a chain, response tokens
only). Then it is given to the learner. ``ours`` is the server's learner. ``release`` has the settings of Aurora's
release: random draft, AdamW at 1e-4, batches of eight, every sample once, five unroll steps, its loss masks. The other
arms are ours with one ingredient removed or changed (learning_arms.py). In all arms, tokens are rows of trajectories,
prompts included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import Eagle3Draft, load_draft
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.target import TargetHead, load_target_head
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks.copies import simulate_with_copies
from benchmarks.learning_arms import KNOWN, Arm, arm_names
from benchmarks.learning_plot import plot
from benchmarks.openmp import restart_with_intel_openmp
from benchmarks.recording import load_recording, record, save_recording
from benchmarks.report import median_and_spread, write_report
from demo.model import ensure_model

DRAFT_LENGTH = 3
GOAL = 1.5
WINDOW = 12  # trajectories in the running mean that has to reach the goal
console = Console()


@dataclass
class Run:
    """What one learner achieved. Lists hold one value per trajectory, in order."""

    tokens: list[int] = field(default_factory=list)  # seen before this trajectory
    seconds: list[float] = field(default_factory=list)  # CPU time of the learner before it, without scoring
    steps: list[int] = field(default_factory=list)  # verifications
    accepted: list[int] = field(default_factory=list)  # drafts accepted in them
    unseen: float = 0.0  # acceptance length on unseen prompts at the end
    served: float = 0.0  # the same, with drafts replaced by copies where those are better, as in a server
    copied: float = 0.0  # the same for copies alone, from the request or from earlier answers

    def running(self) -> list[float]:
        """Acceptance length over the last WINDOW trajectories."""
        found = []
        for i in range(len(self.steps)):
            part = slice(max(0, i + 1 - WINDOW), i + 1)
            found.append(1.0 + sum(self.accepted[part]) / max(sum(self.steps[part]), 1))
        return found

    def tokens_to(self, goal: float) -> int | None:
        """Tokens seen when the running mean first reached the goal; None if it never did."""
        reached = (tokens for tokens, mean in zip(self.tokens, self.running(), strict=True) if mean >= goal)
        return next(reached, None)


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    tokens: Annotated[int, typer.Option(help="rows to learn from, prompts included")] = 40_000,
    seeds: Annotated[int, typer.Option(help="runs of each arm")] = 3,
    arms: Annotated[str, typer.Option(help="arms, separated by commas; 'discard' adds those with a discard term")] = "",
    processes: Annotated[int, typer.Option(help="learners at the same time, one thread each")] = 2,
    unseen: Annotated[int, typer.Option(help="requests to measure on, which are not learned from")] = 128,
    answer_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    capture: Annotated[
        Path | None, typer.Option(help="file of recorded traffic: read if it exists, else recorded and written")
    ] = None,
) -> None:
    """Measure tokens_to_1_5_ratio and acceptance_length_unseen."""
    restart_with_intel_openmp()
    chosen = {name: arm for name, arm in KNOWN.items() if name in arm_names(arms)}
    with TemporaryDirectory() as scratch:
        recorded = capture or Path(scratch) / "capture.pt"
        if not recorded.exists():
            trajectories, domain = record(tokens, unseen, answer_tokens, 0, console)
            save_recording(recorded, trajectories, domain, unseen)
        trajectories, domain, unseen = load_recording(recorded)
        rows = sum(len(one.token_ids) for one in trajectories[:-unseen])
        console.print(f"{domain}: {len(trajectories) - unseen} requests, {rows} rows; {unseen} unseen requests")
        jobs = [(name, seed, str(recorded)) for seed in range(seeds) for name in chosen]
        runs: dict[str, list[Run]] = {name: [] for name in chosen}
        about = {"domain": domain, "rows": rows, "seeds": seeds}
        with get_context("spawn").Pool(processes) as pool, Progress(console=console) as progress:
            bar = progress.add_task("learning", total=len(jobs))
            for done, (name, run) in enumerate(pool.imap(_run, jobs), 1):
                runs[name].append(run)
                progress.update(bar, advance=1, description=f"{name}: {run.unseen:.2f} unseen")
                if json is not None:  # after every run, so that an interrupted benchmark keeps its results
                    _write(json, runs, rows, about | {"complete": done == len(jobs)})
    console.print(summary(runs, rows)[0])


def _write(json: Path, runs: dict[str, list[Run]], rows: int, about: dict[str, Any]) -> None:
    there = {name: some for name, some in runs.items() if some}
    figures, spread = summary(there, rows)
    detail = {name: [asdict(run) for run in some] for name, some in there.items()}
    write_report(json, figures, spread, 0, about | {"runs": detail})
    plot({KNOWN[name].label: some for name, some in there.items()}, GOAL, json.with_suffix(".png"))


def summary(runs: dict[str, list[Run]], rows: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians over the seeds and their spread, by name. A run that never reached the goal counts with all its rows."""
    figures: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for name, some in runs.items():
        reached = [run.tokens_to(GOAL) for run in some]
        values: dict[str, Sequence[float]] = {
            "tokens_to_1_5": [rows if tokens is None else tokens for tokens in reached],
            "acceptance_length_unseen": [run.unseen for run in some],
            "acceptance_length_served": [run.served for run in some],
            "acceptance_length_copies": [run.copied for run in some],
            "cpu_seconds": [run.seconds[-1] for run in some],
        }
        for key, samples in values.items():
            figures[f"{key}_{name}"], spread[f"{key}_{name}"] = median_and_spread(samples)
        figures[f"reached_1_5_{name}"] = sum(tokens is not None for tokens in reached)
    if "ours" in runs:
        figures["acceptance_length_unseen"] = figures["acceptance_length_unseen_ours"]
        if "release" in runs:
            figures["tokens_to_1_5_ratio"] = figures["tokens_to_1_5_release"] / max(figures["tokens_to_1_5_ours"], 1)
    return figures, spread


def learn(
    arm: Arm, seed: int, trajectories: Sequence[Trajectory], unseen: Sequence[Trajectory], draft: Eagle3Draft,
    head: TargetHead, target: Path, clock: Callable[[], float] = time.process_time,
) -> Run:  # fmt: skip
    """Replay recorded trajectories through one learner. It trains a copy of the draft."""
    longest = max(len(one.token_ids) for one in trajectories)
    curriculum = arm.curriculum(seed, longest, draft, head, target)
    draft = curriculum.candidate
    run, seconds, waiting = Run(), 0.0, 0
    for one in trajectories:
        score = simulate(draft, head, one, DRAFT_LENGTH)
        run.tokens.append(curriculum.tokens_seen)
        run.seconds.append(seconds)
        run.steps.append(score.steps)
        run.accepted.append(sum(score.accepted))
        began = clock()
        curriculum.add(one)
        waiting += 1
        if waiting >= arm.batch_sequences:  # so many new trajectories make a batch
            waiting = 0
            while curriculum.next():
                curriculum.work()
        seconds += clock() - began
    total = sum((simulate(draft, head, one, DRAFT_LENGTH) for one in unseen), Score(0, (0,) * DRAFT_LENGTH))
    run.unseen = total.acceptance_length
    served, copied = simulate_with_copies(draft, head, trajectories, unseen, DRAFT_LENGTH)
    run.served, run.copied = served.acceptance_length, copied.acceptance_length
    return run


def _run(job: tuple[str, int, str]) -> tuple[str, Run]:
    name, seed, capture = job
    torch.set_num_threads(1)
    trajectories, _, unseen = load_recording(Path(capture))
    target = ensure_model()
    with TemporaryDirectory() as scratch:
        draft = load_draft(make_day0_draft(target, Path(scratch) / "draft"))
    arm = KNOWN[name]
    return name, learn(
        arm, seed, trajectories[:-unseen], trajectories[-unseen:], draft, load_target_head(target), target
    )


if __name__ == "__main__":
    typer.run(main)
