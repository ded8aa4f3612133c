"""How much acceptance length is lost after a swap, and after K = 0.

    python -m benchmarks.swap_dip --json benchmarks/results/swap_dip.json

After a swap, draft KV computed with the old weights remains in running requests and in the prefix cache. After steps
with K = 0, the draft has no KV for their tokens. Greedy requests are run several times, so that all runs draft after
the same tokens:

    whole            on the new weights throughout, prefix cache emptied before
    swapped          begun on the old weights, which are swapped for the new ones between two steps
    cached           on the new weights, with the prompt's KV that ``swapped`` left in the prefix cache
    dropped          as ``swapped``, with the old draft KV zeroed at the swap
    cached_dropped   as ``cached``, after ``dropped``
    late             on the new weights, begun without drafts; drafting begins where the others swap

Acceptance lengths are compared by tokens since the change, at the same positions of the same answers. A verification
belongs to the position where it begins. The one whose drafts were already made at the swap is not counted. Before each
run but the cached ones the draft's KV is zeroed, so that no block holds KV of earlier runs. The old and the new draft
learned from 50 and 100 requests (``--old day0``: the old one is untrained); none of these is measured on.
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
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks.engine import Engine, humaneval_engine
from benchmarks.openmp import restart_with_intel_openmp
from benchmarks.report import write_report

LEARN = (50, 100)  # requests that the old and the new draft learned from: enough for induction heads
BATCH = 8
BEFORE = 16  # answer tokens of every request when the weights are swapped
AGES = (0, 16, 32, 48)  # tokens since the swap
RESAMPLES = 2000
DRAFTS = 3
console = Console()


@dataclass
class Answer:
    """The length of an answer after each of its steps; the first step is the prefill."""

    lengths: list[int] = field(default_factory=list)

    def verifications(self, first: int, after: int, before: int) -> list[int]:
        """Tokens gained by each verification that began with ``after <= length - first < before``."""
        return [end - start for start, end in pairwise(self.lengths) if after <= start - first < before]


@dataclass
class Runs:
    """One request's answers by run (see the module's docstring)."""

    whole: Answer
    swapped: Answer
    cached: Answer
    dropped: Answer
    cached_dropped: Answer
    late: Answer
    first: dict[str, int]  # by run with a change: the answer's length when the first verification that counts begins


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    requests: Annotated[int, typer.Option(help="requests to measure, in batches of 8")] = 32,
    old: Annotated[str, typer.Option(help="the old weights: lesson (taught) or day0 (untrained)")] = "lesson",
    eager: Annotated[bool, typer.Option(help="vLLM's eager mode instead of its compiled one")] = True,
    seed: int = 0,
) -> None:
    """Measure acceptance length shortly after a change, relative to a run without one."""
    if old not in ("lesson", "day0"):
        raise typer.BadParameter(f"--old is lesson or day0, not {old}")
    restart_with_intel_openmp()
    with humaneval_engine(eager) as (engine, prompts):
        watch = engine.scheduler._advisor._rollback_watch
        watch._rollout = Rollout(DRAFTS, 0.0)  # never rolls back: the old draft is worse on purpose
        weights = _drafts(engine, prompts[: LEARN[1]], "day0" if old == "day0" else "lesson")
        measured = prompts[LEARN[1] : LEARN[1] + requests]
        runs: list[Runs] = []
        for i in track(range(0, len(measured), BATCH), "requests", console=console):
            runs += _measure(engine, measured[i : i + BATCH], weights)

    figures, spread, curves = summary(runs, seed)
    console.print(figures)
    if json is not None:
        write_report(json, figures, spread, seed, {"old": old, "eager": eager, "by_age": curves})
        _plot(curves, json.with_suffix(".png"))


def summary(runs: Sequence[Runs], seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]:
    """Figures, their spread (quantiles of bootstrapped sets of requests), and acceptance lengths by age."""

    def dips(chosen: Sequence[Runs]) -> dict[str, float]:
        def dip(which: str, since: str) -> float:
            return _length(chosen, which, since, 0, AGES[1]) / _length(chosen, "whole", since, 0, AGES[1])

        return {
            "post_swap_dip": dip("swapped", "swapped"),
            "prefix_cache_dip": dip("cached", ""),
            "post_swap_dip_kv_dropped": dip("dropped", "dropped"),
            "prefix_cache_dip_kv_dropped": dip("cached_dropped", ""),
            "catch_up_dip": dip("late", "late"),
        }

    rng = random.Random(seed)
    samples = [dips(rng.choices(runs, k=len(runs))) for _ in range(RESAMPLES)]
    figures: dict[str, Any] = dict(dips(runs))
    spread = {}
    for name in figures:
        ordered = sorted(sample[name] for sample in samples)
        spread[name] = [ordered[int(q * (RESAMPLES - 1))] for q in (0.025, 0.25, 0.75, 0.975)]
    ends = (*AGES[1:], AGES[-1] + 16)
    curves = {
        label: [_length(runs, which, since, *age) for age in zip(AGES, ends, strict=True)]
        for label, which, since in (
            ("wholly on the new weights", "whole", "swapped"),
            ("swapped while running, KV dropped", "dropped", "dropped"),
            ("swapped while running, KV kept", "swapped", "swapped"),
            ("drafts only since then", "late", "late"),
        )
    }
    figures["acceptance_length_new"] = curves["wholly on the new weights"][0]
    return figures | {"requests": len(runs)}, spread, curves


def _length(chosen: Sequence[Runs], which: str, since: str, after: int, before: int) -> float:
    """Acceptance length of the run ``which``, from ``after`` to ``before`` tokens since the change in the run ``since``
    ("": since the answer began)."""
    gained: list[int] = []
    for runs in chosen:
        gained += getattr(runs, which).verifications(runs.first.get(since, 1), after, before)
    return sum(gained) / len(gained) if gained else 0.0


def _drafts(
    engine: Engine, prompts: list[str], old: Literal["lesson", "day0"]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The old and the new weights, learned from the target's answers to these prompts."""
    engine.drain()
    assembler = Assembler(engine.session.row_layout)
    seen: list[Trajectory] = []
    with engine.draft_length("never"):
        for start in range(0, len(prompts), BATCH):
            engine.generate(prompts[start : start + BATCH], max_tokens=64)
            engine.let_requests_end()
            seen += assembler.feed(engine.drain())

    def learned(some: list[Trajectory]) -> dict[str, torch.Tensor]:
        draft = load_draft(engine.session.draft)
        for _ in Lesson(draft, load_target_head(engine.session.target)).run(some) if some else ():
            pass
        return bank_tensors(draft)

    return learned(seen[: LEARN[0]] if old == "lesson" else []), learned(seen)


def _measure(
    engine: Engine, prompts: list[str], weights: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> list[Runs]:
    """All runs of a batch of requests."""
    old, new = weights
    total = BEFORE + 2 * (1 + DRAFTS) + AGES[-1] + 16
    _go_live(engine, new)
    _forget(engine)
    whole = _Batch(engine, prompts, total)
    whole.run()

    _forget(engine)
    late = _Batch(engine, prompts, total)
    with engine.draft_length("never"):
        late.run(BEFORE)
    late.step()  # drafts for the first time
    first = {"late": late.lengths()}
    late.run()

    answers = {"whole": whole.answers, "late": late.answers}
    for swapped, cached, drops in (("swapped", "cached", False), ("dropped", "cached_dropped", True)):
        _go_live(engine, old)
        _forget(engine)
        running = _Batch(engine, prompts, total)
        running.run(BEFORE)
        _go_live(engine, new)
        if drops:
            _zero_draft_kv(engine)
        running.step()  # verifies drafts of the old weights
        first[swapped] = running.lengths()
        running.run()
        behind = _Batch(engine, prompts, BEFORE + 1 + DRAFTS)
        behind.run()
        answers |= {swapped: running.answers, cached: behind.answers}
    engine.drain()
    return [
        Runs(**{name: some[i] for name, some in answers.items()}, first={name: of[i] for name, of in first.items()})
        for i in range(len(prompts))
    ]


def _forget(engine: Engine) -> None:
    """Forget cached prompts, and zero the draft's KV, so that blocks hold nothing of earlier runs."""
    engine.llm.reset_prefix_cache()
    _zero_draft_kv(engine)


@torch.inference_mode()
def _zero_draft_kv(engine: Engine) -> None:
    for module in engine.worker.model_runner.get_draft_model().modules():
        cache = getattr(module, "kv_cache", None)
        if isinstance(cache, torch.Tensor):
            cache.zero_()


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

    def lengths(self) -> list[int]:
        """Tokens of each answer so far."""
        return [answer.lengths[-1] if answer.lengths else 0 for answer in self.answers]

    def run(self, until: int | None = None) -> None:
        """Step to the end, or until every answer has ``until`` tokens."""
        while self._running and (until is None or min(self.lengths()) < until):
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
    axes.set_xlabel("answer tokens since the change")
    axes.set_ylabel("acceptance length")
    axes.set_xticks([*AGES, AGES[-1] + 16])
    axes.set_ylim(bottom=1.0)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
