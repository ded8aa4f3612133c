"""``make demo``: a server that starts without a draft and learns one from its traffic, compared with plain vLLM.

Both servers run with the same flags. They take turns, so that neither disturbs the other. During plain vLLM's turns
Aurora's learner is stopped (SIGSTOP). During Aurora's turns the learner runs within its budget, so its cost is included
in what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_report
from demo import figures
from demo.client import Block, drive
from demo.figures import Pair
from demo.fleet import Fleet, failure_told
from demo.model import ensure_model
from demo.plot import plot
from demo.serving import ENVIRONMENT, MODEL_NAME, PLAIN, START_S, flags
from demo.signals import end_on_signals
from demo.view import shown
from demo.watch import Progress, Watcher
from demo.workload import Kind, Prompt, Workload, load

FLAGS = flags(max_num_seqs=8)
MAX_DRAFT_LENGTH = 3  # aurora's default, which is used here
LEARN_CONCURRENCY = 4
# Twice the default, and not bounded by what speculation gains: shows in minutes what otherwise takes an hour or two.
SHARES = ("--aurora-learner-cpu-share", "--aurora-learner-least-share", "--aurora-learner-resting-share")
LEARNER = tuple(word for flag in SHARES for word in (flag, "0.1"))  # always the same


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    minutes: float = 14.0
    max_tokens: int = 96
    day0_blocks: int = 5
    day0_prompts: int = 10  # per block
    pairs: int = 4  # of measured blocks, at each concurrency
    prompts_c1: int = 3  # per measured block
    prompts_c4: int = 8
    measure_s: float = 270.0  # reserved for measuring

    @classmethod
    def quick(cls, minutes: float) -> Plan:
        """A short run, which shows that everything works, not how well."""
        return cls(minutes, 64, 2, 4, 2, 1, 4, 60.0)


class Demo:
    """One run, from the start of the servers to the measured blocks."""

    def __init__(self, plan: Plan, workload: Workload, console: Console, out: Path) -> None:
        self.plan, self._workload, self._console = plan, workload, console
        self.progress = Progress()
        self.day0: list[Pair] = []
        self.measured: dict[int, list[Pair]] = {1: [], 4: []}
        self.learned = 0  # requests that Aurora served until the end of the learning phase
        self.learning_samples = 0  # progress.samples until then
        self._fleet = Fleet(ENVIRONMENT, out)
        self._deadline = time.monotonic() + plan.minutes * 60

    def run(self, model: Path) -> None:
        """Run everything; no server is left when this returns or raises.

        Raises:
            ServerFailed, httpx.HTTPError: a server ended or refused a request.
        """
        try:
            with shown(self.progress, self._console, self._deadline):
                self._start(model)
                watcher = Watcher(self._fleet["aurora"], self.progress.seen)
                watcher.start()
                try:
                    self._day0()
                    self._learn()
                    self._measure()
                finally:
                    watcher.stop()
        finally:
            self._fleet.close()

    def _start(self, model: Path) -> None:
        for name, arguments in (("aurora", LEARNER), ("plain", PLAIN)):
            self._fleet.start(name, [str(model), *FLAGS, *arguments])

        def tick(waited: float) -> None:
            self.progress.detail = f"two servers, {waited:.0f} s (the first start compiles, about two minutes)"

        self._fleet.wait_up(("aurora", "plain"), START_S, tick, warm_up=LEARN_CONCURRENCY)
        self.progress.detail = ""

    def _day0(self) -> None:
        """The first requests, sent to both servers in turn: what does it cost to start without a draft?"""
        self._stream = itertools.cycle(self._workload.learn)
        self.progress.phase = "day 0"
        for i in range(self.plan.day0_blocks):
            if i and time.monotonic() > self._deadline - 0.5 * self.plan.minutes * 60:
                break  # on a slow machine there are fewer blocks, so the demo takes no longer
            self.progress.detail = f"block {i + 1} of {self.plan.day0_blocks}, both servers, same prompts"
            self.day0.append(
                self._pair(list(itertools.islice(self._stream, self.plan.day0_prompts)), LEARN_CONCURRENCY, i)
            )

    def _learn(self) -> None:
        self.progress.phase, self.progress.detail = "learning", "concurrency 4"
        self._block("aurora", self._stream, LEARN_CONCURRENCY, until=self._deadline - self.plan.measure_s)
        self.learned = self.progress.requests["aurora"]
        self.learning_samples = len(self.progress.samples)

    def _measure(self) -> None:
        """Unseen prompts; both servers in turn, both concurrencies in turn."""
        self.progress.phase = "measuring"
        unseen = iter(self._workload.unseen)
        sizes = {1: self.plan.prompts_c1, 4: self.plan.prompts_c4}
        for i in range(self.plan.pairs):
            began = time.monotonic()
            for concurrency, size in sizes.items():
                self.progress.detail = f"concurrency {concurrency}, block {i + 1} of {self.plan.pairs}, unseen prompts"
                self.measured[concurrency].append(self._pair(list(itertools.islice(unseen, size)), concurrency, i))
            if time.monotonic() + (time.monotonic() - began) > self._deadline:
                break

    def _pair(self, prompts: list[Prompt], concurrency: int, turn: int) -> Pair:
        """Send the same prompts to both servers; the one that goes first alternates."""
        order = ("plain", "aurora") if turn % 2 == 0 else ("aurora", "plain")
        return Pair(**{arm: self._block(arm, prompts, concurrency) for arm in order})

    def _block(self, arm: str, prompts: Iterable[Prompt], concurrency: int, until: float = float("inf")) -> Block:
        self.progress.block_begins(arm)
        with self._fleet.learner_paused("aurora") if arm == "plain" else nullcontext():
            return asyncio.run(
                drive(
                    arm,
                    self._fleet[arm].url,
                    MODEL_NAME,
                    prompts,
                    concurrency,
                    self.plan.max_tokens,
                    lambda answer: self.progress.answered(arm, answer),
                    until,
                )
            )

    def results(self) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
        """Figures, their spread, and further entries of the report."""
        values: dict[str, float] = {}
        spread: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        samples = self.progress.samples[: self.learning_samples]
        for name, first, last in (("first", 0.0, 0.25), ("last", 0.75, 1.0)):
            found = figures.acceptance(samples, first, last, MAX_DRAFT_LENGTH)
            if found is not None:
                values[f"acceptance_length_{name}"] = found.length
                extra[f"acceptance_length_{name}_source"] = found.source
        sets = {"day0_ratio": self.day0, "speedup_c1": self.measured[1], "speedup_c4": self.measured[4]}
        for name, pairs in sets.items():
            some, some_spread = figures.rate_figures(name, pairs)
            values |= some
            spread |= some_spread
            if pairs:
                values[f"{name}_overall"] = figures.overall_ratio(pairs)
                values[f"{name}_changed_answers"] = sum(pair.changed for pair in pairs)
        values["day0_requests"] = len(self.day0) * self.plan.day0_prompts
        values["requests_learned_from"] = self.learned
        values["swaps"] = samples[-1].swaps if samples else 0
        return (
            values,
            spread,
            extra
            | {
                "plan": vars(self.plan),
                "flags": list(FLAGS),
                "aurora_flags": list(LEARNER),
                "status": self.progress.status,
            },
        )


def summary(values: dict[str, float], extra: dict[str, Any]) -> Table:
    """The closing table."""
    table = Table("figure", "value", "meaning", title="aurora_vllm demo")
    source = {name: extra.get(f"acceptance_length_{name}_source", "unknown") for name in ("first", "last")}
    rows = {
        "acceptance_length_first": f"first quarter of the learning phase, K=3 ({source['first']})",
        "acceptance_length_last": f"last quarter ({source['last']})",
        "day0_ratio": f"first {values['day0_requests']:.0f} requests over plain vLLM, same prompts, learner running",
        "speedup_c1": "unseen prompts over plain vLLM, concurrency 1, learner running",
        "speedup_c4": "the same at concurrency 4",
        "speedup_c1_changed_answers": "greedy answers that differ from plain vLLM's, concurrency 1",
        "swaps": "swaps of draft weights while serving",
        "requests_learned_from": "requests until the end of the learning phase",
    }
    for name, meaning in rows.items():
        shown_value = (
            f"{values[name]:.0f}" if float(values.get(name, 0.5)).is_integer() else f"{values.get(name, 0):.2f}"
        )
        table.add_row(name, shown_value if name in values else "–", meaning)
    return table


def main(
    minutes: Annotated[float | None, typer.Option(help="longest duration [default: 14, with --quick 5]")] = None,
    json: Annotated[Path, typer.Option(help="file for the report; the plot is written beside it")] = Path(
        "build/demo/result.json"
    ),
    seed: Annotated[int, typer.Option(help="of the order of the prompts")] = 0,
    workload: Annotated[str, typer.Option(help="humaneval, gsm8k or mixed")] = "humaneval",
    quick: Annotated[bool, typer.Option(help="a short run, which shows that everything works, not how well")] = False,
) -> None:
    """Serve, learn, swap, measure: a server with Aurora and no draft against plain vLLM, on the same prompts."""
    end_on_signals()
    console = Console()
    plan = Plan.quick(minutes or 5.0) if quick else Plan(minutes or 14.0)
    kind: Kind = workload  # type: ignore[assignment]
    demo = Demo(plan, load(kind, seed), console, json.parent)
    with failure_told(console, "the demo", f"{json.parent}/aurora.log, {json.parent}/plain.log"):
        demo.run(ensure_model())
    values, spread, extra = demo.results()
    write_report(json, values, spread, seed, extra | {"quick": quick, "workload": workload})
    picture = json.with_suffix(".png")
    samples = demo.progress.samples[: demo.learning_samples]
    plot(picture, samples, demo.progress.points, values, int(values["day0_requests"]))
    console.print(summary(values, extra))
    console.print(f"written: {json} and {picture}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
