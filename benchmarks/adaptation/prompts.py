"""The prompts: coding, function calling, mathematics, or a file. Only prompts are used; the target answers them.

Coding is HumanEval (OpenAI, MIT) in the demo's three wordings and two more, so that no prompt has to be sent twice.
Function calling is the Berkeley Function Calling Leaderboard (Apache-2.0, package ``bfcl-eval``), with its functions as
JSON in the prompt. Mathematics is GSM8K (OpenAI, MIT) if its file is in the shared folder beside the project.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aurora_vllm.errors import AuroraError
from demo.workload import GSM8K, TASKS, Prompt, Workload, gsm8k, humaneval, split

CODING, FUNCTIONS, MATHEMATICS = "coding", "function calling", "mathematics"
FILE = "file"
WORDINGS = (
    *TASKS,
    "Write the body of this Python function, and tests for it:\n\n```python\n{code}\n```",
    "Implement this step by step, with a comment for each step.\n\n```python\n{code}\n```",
)
BFCL_FILES = ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json")
BFCL_TASK = "You can call these functions:\n\n{functions}\n\n{question}\n\nAnswer with the function call as JSON."
LONGEST = 2000  # characters of a function-calling prompt: about 600 tokens, which fit into the servers' context
UNSEEN_SHARE = 1 / 3  # share of the problems that is kept for measured windows


def domains(seed: int) -> tuple[dict[str, Workload], dict[str, str]]:
    """The domains whose prompts are available; and by name, which domains and workloads are left out, and why."""
    found = {CODING: split(humaneval(WORDINGS), seed, UNSEEN_SHARE)}
    absent = {}
    if (bfcl := bfcl_data()) is not None:
        found[FUNCTIONS] = split(function_calling(bfcl), seed, UNSEEN_SHARE)
    else:
        absent[FUNCTIONS] = "bfcl-eval is not installed (pip install --no-deps bfcl-eval)"
    if GSM8K.is_file():
        found[MATHEMATICS] = split(gsm8k(), seed, UNSEEN_SHARE)
    else:
        absent[MATHEMATICS] = f"{GSM8K.name} is not in ../shared/data"
    if len(found) == 1:
        absent["mixed"] = "there is only one domain"
    return found, absent


def bfcl_data() -> Path | None:
    """The directory of BFCL's data; found without importing the package, which needs many others."""
    spec = importlib.util.find_spec("bfcl_eval")
    places = [Path(place) / "data" for place in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if all((place / name).is_file() for name in BFCL_FILES)), None)


def function_calling(data: Path) -> list[list[Prompt]]:
    """BFCL's single-turn questions with their functions; long ones are left out."""
    problems = []
    for name in BFCL_FILES:
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            question = row["question"][0][-1]["content"]
            text = BFCL_TASK.format(functions=json.dumps(row["function"]), question=question)
            if len(text) <= LONGEST:
                problems.append([Prompt(row["id"], text)])
    return problems


def from_file(path: Path) -> Workload:
    """A file of prompts, one JSON object per line: ``{"prompt": TEXT}``, or Spec-Bench's ``{"turns": [TEXT, ...]}``, of
    which only the first turn is sent. The order is kept, and none is set apart as unseen: none is sent twice.

    Raises:
        AuroraError: the file cannot be read, is empty, or has a line of another form; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise AuroraError(f"--prompts {path}: cannot be read ({reason})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(Prompt(f"{path.name}:{number}", _prompt(line, f"--prompts {path}, line {number}")))
    if not prompts:
        raise AuroraError(f"--prompts {path}: no prompts in it", 'one {"prompt": "..."} per line')
    return Workload(tuple(prompts), ())


def _prompt(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise AuroraError(f"{where}: not JSON ({error})", 'one {"prompt": "..."} per line') from None
    text = None
    if isinstance(row, Mapping):
        turns = row.get("turns")
        text = row.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str) or not text.strip():
        raise AuroraError(f"{where}: neither a prompt nor turns with text in it", 'one {"prompt": "..."} per line')
    return text
