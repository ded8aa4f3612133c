"""What copies alone would gain: the scheduler's lookup and the device's, simulated on answers of a real model.

    python -m benchmarks.lookups --json benchmarks/results/lookups.json

The demo's model answers HumanEval prompts, greedily and without speculation. Then a server is simulated that proposes
copies wherever there are any: a step gains the copied tokens that are right, and one more. The scheduler's lookup
(``spec_decode/prompt_lookup.py``, V1 runner) copies what followed the longest earlier match. The device's lookup
(``spec_decode/device_copies.py``, V2 runner) looks up token by token what followed the context most recently; without a
GPU it runs in Triton's interpreter. Both know the request's own text and the answers before it. Nothing is timed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.evaluate import Score
from aurora_vllm.spec_decode.prompt_lookup import EarlierAnswers
from aurora_vllm.spec_decode.request_states import request_states
from benchmarks.copies import Walk, count_right
from benchmarks.report import median_and_spread, write_report

LENGTHS = (3, 8)  # tokens of a proposal
RESAMPLES = 500
console = Console()


def main(
    json: Annotated[Path | None, typer.Option(help="file for the report; a plot is written beside it")] = None,
    requests: Annotated[int, typer.Option(help="requests to answer and simulate")] = 96,
    tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 160,
    seed: int = 0,
) -> None:
    """Measure the acceptance length of copies, for both lookups."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    answers = _record(requests, tokens, seed)
    scores: dict[str, list[Score]] = {}
    for length in LENGTHS:
        scores[f"scheduler_{length}"] = _scores(answers, Scheduler(length).answer, f"scheduler, {length} tokens")
        scores[f"device_{length}"] = _scores(answers, OnDevice(length, device).answer, f"device, {length} tokens")

    figures = {name: _sum(found).acceptance_length for name, found in scores.items()}
    ratios = {f"device_over_scheduler_{n}": figures[f"device_{n}"] / figures[f"scheduler_{n}"] for n in LENGTHS}
    console.print(figures | ratios)
    if json is not None:
        spread = {name: _spread(found, seed) for name, found in scores.items()}
        extra = {"device": device.type, "requests": requests, "tokens": sum(len(ids) - at for ids, at in answers)}
        write_report(json, figures | ratios, spread, seed, extra)
        _plot(figures, spread, json.with_suffix(".png"))


class Scheduler:
    """Copies as in the V1 runner's scheduler, from the request and from the answers before it."""

    def __init__(self, length: int) -> None:
        self._answers = EarlierAnswers(AuroraConfig().prompt_lookup_answers)
        self._length = length

    def answer(self, tokens: Sequence[int], prompt: int) -> Score:
        """Simulate one request. prompt: how many of its tokens are the prompt's."""
        walk = Walk(self._length, self._answers, always=True)
        walk.answer(tokens, prompt + 1, [0] * (len(tokens) - prompt - 1))
        self._answers.add(tokens[prompt:])
        return walk.score


class OnDevice:
    """Copies as in the V2 runner's worker, from the same texts."""

    def __init__(self, length: int, device: torch.device) -> None:
        from aurora_vllm.spec_decode.device_copies import DeviceCopies

        self._text = torch.zeros(1, 4096, dtype=torch.int32, device=device)
        self._total = torch.zeros(1, dtype=torch.int32, device=device)
        self._prompt = np.zeros(1, dtype=np.int32)
        states = request_states(self._text, self._total, self._prompt, 1 << 20)
        self._copies = DeviceCopies(states, length, AuroraConfig().prompt_lookup_answers, device)
        self._length, self._device, self._requests = length, device, 0

    def answer(self, tokens: Sequence[int], prompt: int) -> Score:
        """Simulate one request. prompt: how many of its tokens are the prompt's."""
        self._requests += 1
        name = str(self._requests)
        self._copies.begin(name, SimpleNamespace(extra_args=None, temperature=0.0))
        self._text[0, : len(tokens)] = torch.tensor(tokens)
        self._prompt[0] = prompt
        known, gained, steps, accepted = prompt + 1, 1, 0, [0] * self._length
        while known < len(tokens):
            self._total.fill_(known)
            proposed = self._propose(name, prompt, known, gained)
            gained = count_right(proposed, tokens[known:]) + 1
            for i in range(gained - 1):
                accepted[i] += 1
            steps, known = steps + 1, known + gained
        self._total.fill_(len(tokens))
        self._propose(name, prompt, len(tokens), gained)  # vLLM's worker hears of an end only after the last step
        self._copies.end(name)
        return Score(steps, tuple(accepted))

    def _propose(self, name: str, prompt: int, known: int, gained: int) -> list[int]:
        first, slot = known == prompt + 1, np.zeros(1, dtype=np.int64)
        batch = SimpleNamespace(
            num_reqs=1, req_ids=[name], idx_mapping=torch.from_numpy(slot).to(self._device), idx_mapping_np=slot,
            num_computed_tokens_np=np.array([0 if first else known - gained]),
            num_scheduled_tokens=np.array([prompt if first else gained]), prefill_len_np=np.array([prompt]),
        )  # fmt: skip
        drafts = torch.zeros(1, self._length, dtype=torch.int64, device=self._device)
        sampled = torch.tensor([gained], dtype=torch.int32, device=self._device)
        rejected = torch.tensor([0 if first else self._length + 1 - gained], dtype=torch.int32, device=self._device)
        self._copies.replace(batch, sampled, rejected, drafts, self._length, None, 0)
        found: list[int] = drafts[0].tolist()
        return found


def _record(requests: int, tokens: int, seed: int) -> list[tuple[list[int], int]]:
    """For each request its tokens (prompt, then answer), and how many of them are the prompt's."""
    from benchmarks.engine import SERVER, Engine
    from demo.model import ensure_model
    from demo.workload import humaneval

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    texts = [wording.text for wordings in humaneval() for wording in wordings]
    random.Random(seed).shuffle(texts)
    with TemporaryDirectory() as scratch:
        engine = Engine.start(ensure_model(), Path(scratch), speculate="never", enforce_eager=False, **SERVER)
        try:
            template = engine.llm.get_tokenizer().apply_chat_template
            chats = [[{"role": "user", "content": text}] for text in texts[:requests]]
            prompts = [list(template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]
            done: list[tuple[list[int], int]] = []
            for i in track(range(0, len(prompts), 8), "answers", console=console):
                outputs = engine.generate(prompts[i : i + 8], max_tokens=tokens, ignore_eos=False)
                pairs = zip(prompts[i : i + 8], outputs, strict=True)
                done += [([*prompt, *output.outputs[0].token_ids], len(prompt)) for prompt, output in pairs]
            return done
        finally:
            engine.close()


def _scores(
    answers: Sequence[tuple[list[int], int]], score: Callable[[list[int], int], Score], name: str
) -> list[Score]:
    return [score(tokens, prompt) for tokens, prompt in track(answers, name, console=console)]


def _sum(scores: Sequence[Score]) -> Score:
    return sum(scores[1:], scores[0])


def _spread(scores: Sequence[Score], seed: int) -> list[float]:
    """Spread of the acceptance length over bootstrapped sets of requests."""
    rng = random.Random(seed)
    drawn = (_sum(rng.choices(scores, k=len(scores))) for _ in range(RESAMPLES))
    return median_and_spread([one.acceptance_length for one in drawn])[1]


def _plot(figures: dict[str, float], spread: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for i, where in enumerate(("scheduler", "device")):
        names = [f"{where}_{length}" for length in LENGTHS]
        heights = [figures[name] for name in names]
        error = np.array([(figures[name] - spread[name][1], spread[name][2] - figures[name]) for name in names]).T
        axes.bar(np.arange(len(LENGTHS)) + 0.38 * i, heights, 0.36, yerr=np.abs(error), label=f"{where}'s lookup")
    axes.set_xticks(np.arange(len(LENGTHS)) + 0.19, [f"proposals of {length}" for length in LENGTHS])
    axes.set_ylabel("acceptance length of copies alone")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
