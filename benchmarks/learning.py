"""How fast the draft learns: recorded traffic, replayed through learners that differ in one respect each.

    python -m benchmarks.learning --json benchmarks/results/learning.json

Each trajectory is scored before anything trains on it (prequential acceptance length: K=3, a chain, response tokens
only). Then it is given to the learner. ``ours`` is the server's learner. ``release`` has the settings of Aurora's
release: random draft, AdamW at 1e-4, batches of eight, every sample once, five unroll steps, its loss masks. The other
arms are ours with one ingredient removed or changed. In all arms, tokens are rows of trajectories, prompts included.
"""

from __future__ import annotations

import copy
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

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import Eagle3Draft, load_draft
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import TargetHead, load_target_head
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks.copies import simulate_with_copies
from benchmarks.learning_plot import plot
from benchmarks.openmp import restart_with_intel_openmp
from benchmarks.recording import load_recording, record, save_recording
from benchmarks.report import median_and_spread, write_report
from demo.model import ensure_model

DRAFT_LENGTH = 3
GOAL = 1.5
WINDOW = 12  # trajectories in the running mean that has to reach the goal
RELEASE: dict[str, Any] = {
    "semantics": "aurora-release", "learning_rate": 1e-4, "replay_passes": 1.0, "ttt_length": 5,
    "vocabulary_coverage": 0.0, "prompt_weight": 0.0, "weight_average": 0.0,
}  # fmt: skip
RELEASE_BATCH = 8  # sequences per step
console = Console()


@dataclass(frozen=True)
class Arm:
    """One way to learn."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)  # over AuroraConfig's defaults
    random_start: bool = False
    silent_start: bool = False  # as where the target is quantized (day0_layer.py)
    lessons: bool = True
    induction: bool = True
    refining: bool = True
    batch_sequences: int = 0  # sequences per step; 0: as many as batch_tokens allows


ARMS = {
    "ours": Arm("ours"),
    "release": Arm("Aurora's release", RELEASE, random_start=True, batch_sequences=RELEASE_BATCH),
    "no_lesson": Arm("without the lessons", lessons=False),
    "no_induction": Arm("lessons without induction heads", induction=False),
    "no_warm_start": Arm("without the warm start", random_start=True),
    "no_refining": Arm("lessons, then all at the full rate", refining=False),
    "no_average": Arm("without averaging weights", {"weight_average": 0.0}),
    "no_vocabulary": Arm("without choosing the vocabulary anew", {"vocabulary_coverage": 0.0}),
    "no_replay": Arm("every sample once", {"replay_passes": 1.0}),
    "half_replay": Arm("half the passes", {"replay_passes": 4.0}),
    "small_batch": Arm("a quarter of the batch", {"batch_tokens": 128}),
}
# Only by name: what the target's layer is worth as a start, which a quantized target cannot give.
SILENT = {
    "silent": Arm("without the target's layer", silent_start=True),
    "silent_no_lesson": Arm("without the target's layer and the lessons", silent_start=True, lessons=False),
}
# The paper's discard term, by its weight λ and by k: p is restricted to the target's k most probable tokens.
DISCARD = {
    f"discard_{weight:g}_{top_k}": Arm(
        f"discard term, λ={weight:g}, k={top_k}", {"discard_weight": weight, "discard_top_k": top_k}
    )
    for weight in (0.1, 1.0)
    for top_k in (3, 5, 8)
}
KNOWN = ARMS | SILENT | DISCARD


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
    chosen = {name: arm for name, arm in KNOWN.items() if name in _names(arms)}
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
    torch.manual_seed(seed)
    draft = copy.deepcopy(draft)
    if arm.random_start:
        _forget(draft)
    if arm.silent_start:
        _silence(draft)
    batch = arm.settings.get("batch_tokens", AuroraConfig().batch_tokens)
    if arm.batch_sequences:
        batch = arm.batch_sequences * max(len(one.token_ids) for one in trajectories)
    config = AuroraConfig(**(arm.settings | {"seed": seed, "batch_tokens": batch}))
    curriculum = Curriculum(draft, head, config, target, worth_keeping=False)
    if not arm.lessons:
        curriculum.skip_lessons()
    elif not arm.induction:
        curriculum.teacher = Lesson(draft, head, induction=False)
    if not arm.refining:
        curriculum.trainer.refine = curriculum.trainer.optimizer.state.clear  # type: ignore[method-assign]
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


def _names(arms: str) -> list[str]:
    if not arms:
        return list(ARMS)
    names = [name.strip() for name in arms.split(",")]
    names += list(DISCARD) if "discard" in names else []
    unknown = sorted(set(names) - KNOWN.keys() - {"discard"})
    if unknown:
        raise typer.BadParameter(f"no arm {', '.join(unknown)}; known arms: {', '.join(KNOWN)}")
    return names


def _forget(draft: Eagle3Draft) -> None:
    """Initialise as Aurora's release does without a given draft: matrices normal with deviation 0.02, norms one."""
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


def _silence(draft: Eagle3Draft) -> None:
    """Replace the layer's projections as in a quantized target's day-0 draft."""
    attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
    with torch.no_grad():
        for inputs in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            inputs.weight.normal_(0.0, inputs.in_features**-0.5)
        for output in (attention.o_proj, mlp.down_proj):
            output.weight.zero_()


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
