"""What a swap leaves behind: draft KV by the old weights, in requests that run on and in the prefix cache.

    python -m benchmarks.swap_dip --json benchmarks/results/swap_dip.json

Greedy requests run three times, so that all runs draft behind the same tokens: wholly on the new weights (prefix cache
emptied before); begun on the old ones, which are swapped for the new between two steps; and begun on the new ones with
the prompt's KV of the second run, by the old weights, in the prefix cache. Acceptance length is compared by tokens
since the swap, at the same positions of the same answers. A verification counts where it begins; the one whose drafts
were under way at the swap is the old weights' and counts for nobody. Old and new are two drafts learned from 12 and 24
requests (``--old day0``: the untrained one), none of them measured on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track

from aurora_vllm.control.rollout import Rollout
from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.trajectory import Assembler, Trajectory
from benchmarks.engine import Engine, humaneval_engine
from benchmarks.openmp import restart_with_intel_openmp
from benchmarks.report import write_report

LEARN = (12, 24)  # requests that the old and the new draft learned from
BATCH = 8
BEFORE = 16  # answer tokens of every request when the weights are swapped
AGES = (0, 16, 32, 48)  # tokens since the swap
RESAMPLES = 2000
DRAFTS = 3
console = Console()


@dataclass
class Answer:
    """How long an answer was after each of its steps, the first of which is the prompt's."""

    lengths: list[int] = field(default_factory=list)

    def verifications(self, first: int, after: int, before: int) -> list[int]:
        """Tokens gained by each verification that began with ``after <= length - first < before``."""
        return [end - start for start, end in pairwise(self.lengths) if after <= start - first < before]


def main(
    json: Annotated[Path | None, typer.Option(help="where the report goes; a plot is put beside it")] = None,
    requests: Annotated[int, typer.Option(help="requests measured, in batches of 8")] = 32,
    old: Annotated[str, typer.Option(help="the weights before: lesson (learned) or day0 (not)")] = "lesson",
    eager: Annotated[bool, typer.Option(help="vLLM's eager mode instead of its compiled one")] = True,
    seed: int = 0,
) -> None:
    """Measure post_swap_dip and prefix_cache_dip."""
    if old not in ("lesson", "day0"):
        raise typer.BadParameter(f"--old is lesson or day0, not {old}")
    restart_with_intel_openmp()
    with humaneval_engine(eager) as (engine, prompts):
        engine.scheduler._advisor._rollout = Rollout(DRAFTS, 0.0)  # the old draft is rightly worse, and has to stay
        weights = _drafts(engine, prompts[: LEARN[1]], "day0" if old == "day0" else "lesson")
        measured = prompts[LEARN[1] : LEARN[1] + requests]
        runs: list[tuple[Answer, Answer, Answer, int]] = []
        for i in track(range(0, len(measured), BATCH), "requests", console=console):
            runs += _measure(engine, measured[i : i + BATCH], weights)

    figures, spread, curves = summary(runs, seed)
    console.print(figures)
    if json is not None:
        write_report(json, figures, spread, seed, {"old": old, "eager": eager, "by_age": curves})
        _plot(curves, json.with_suffix(".png"))


def summary(
    runs: Sequence[tuple[Answer, Answer, Answer, int]], seed: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]:
    """Figures, their spread (95 % of bootstrapped sets of requests), acceptance lengths by age.

    Args:
        runs: for each request the answers wholly on new weights, across the swap and behind the prefix cache, and
            how long the second was when the first drafts of the new weights were verified.
    """

    def length(chosen: Sequence[tuple[Answer, Answer, Answer, int]], which: int, after: int, before: int) -> float:
        gained: list[int] = []
        for *answers, first in chosen:
            gained += answers[which].verifications(first if which < 2 else 1, after, before)
        return sum(gained) / len(gained) if gained else 0.0

    def ratio(chosen: Sequence[tuple[Answer, Answer, Answer, int]], which: int) -> float:
        if which == 1:
            reference = length(chosen, 0, 0, AGES[1])
        else:  # compared from the answer's first token on
            gained = [n for run in chosen for n in run[0].verifications(1, 0, AGES[1])]
            reference = sum(gained) / len(gained)
        return length(chosen, which, 0, AGES[1]) / reference

    rng = random.Random(seed)
    samples = [rng.choices(runs, k=len(runs)) for _ in range(RESAMPLES)]
    figures: dict[str, Any] = {"post_swap_dip": ratio(runs, 1), "prefix_cache_dip": ratio(runs, 2)}
    spread = {}
    for which, name in ((1, "post_swap_dip"), (2, "prefix_cache_dip")):
        ordered = sorted(ratio(sample, which) for sample in samples)
        spread[name] = [ordered[int(q * (RESAMPLES - 1))] for q in (0.025, 0.25, 0.75, 0.975)]
    ends = (*AGES[1:], AGES[-1] + 16)
    curves = {
        name: [length(runs, which, after, before) for after, before in zip(AGES, ends, strict=True)]
        for which, name in ((0, "wholly on the new weights"), (1, "swapped while running"))
    }
    figures["acceptance_length_new"], figures["acceptance_length_swapped"] = (curve[0] for curve in curves.values())
    return figures | {"requests": len(runs)}, spread, curves


def _drafts(
    engine: Engine, prompts: list[str], old: Literal["lesson", "day0"]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The old and the new weights, learned from what the target answers to these prompts."""
    engine.drain()
    with engine.draft_length("never"):
        engine.generate(prompts, max_tokens=64)
    seen = Assembler(engine.session.row_layout).feed(engine.drain())

    def learned(some: list[Trajectory]) -> dict[str, torch.Tensor]:
        draft = load_draft(engine.session.draft)
        for _ in Lesson(draft, load_target_head(engine.session.target)).run(some) if some else ():
            pass
        return bank_tensors(draft)

    return learned(seen[: LEARN[0]] if old == "lesson" else []), learned(seen)


def _measure(
    engine: Engine, prompts: list[str], weights: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> list[tuple[Answer, Answer, Answer, int]]:
    """The three runs of a batch, as :func:`summary` takes them."""
    old, new = weights
    total = BEFORE + 2 * (1 + DRAFTS) + AGES[-1] + 16
    _go_live(engine, new)
    engine.llm.reset_prefix_cache()
    whole = _Batch(engine, prompts, total)
    whole.run()

    _go_live(engine, old)
    engine.llm.reset_prefix_cache()
    swapped = _Batch(engine, prompts, total)
    while min(len(answer.lengths) and answer.lengths[-1] for answer in swapped.answers) < BEFORE:
        swapped.step()
    _go_live(engine, new)
    swapped.step()  # verifies what the old weights had drafted
    first = [answer.lengths[-1] for answer in swapped.answers]
    swapped.run()

    cached = _Batch(engine, prompts, BEFORE + 1 + DRAFTS)
    cached.run()
    engine.drain()
    return list(zip(whole.answers, swapped.answers, cached.answers, first, strict=True))


class _Batch:
    """Requests that start together, stepped by hand."""

    def __init__(self, engine: Engine, prompts: list[str], tokens: int) -> None:
        from vllm import SamplingParams

        self._core = engine.llm.llm_engine
        self.answers = [Answer() for _ in prompts]
        self._running = set(range(len(prompts)))
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            self._core.add_request(str(i), prompt, params)

    def step(self) -> None:
        for output in self._core.step():
            answer, length = self.answers[int(output.request_id)], len(output.outputs[0].token_ids)
            if not answer.lengths or length > answer.lengths[-1]:
                answer.lengths.append(length)
            if output.finished:
                self._running.discard(int(output.request_id))

    def run(self) -> None:
        while self._running:
            self.step()


def _go_live(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    worker = engine.control.worker
    version = max(engine.bank.published(), worker.live_version) + 1
    engine.bank.publish(version, tensors, {"why": "benchmark"})
    engine.wait_for(lambda: worker.staged_version == version)
    if (stager := engine.attachment.stager) is not None:
        stager.commit_if_ready()
    if worker.live_version != version:
        raise RuntimeError(f"version {version} did not go live: {worker.refusal}")


def _plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for label, lengths in curves.items():
        axes.plot([age + 8 for age in AGES], lengths, marker="o", label=label)
    axes.set_xlabel("answer tokens since the swap")
    axes.set_ylabel("acceptance length")
    axes.set_xticks([*AGES, AGES[-1] + 16])
    axes.set_ylim(bottom=1.0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
