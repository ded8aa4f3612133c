"""The servers that are compared. All are started by the same program with the same flags, plus the arm's own."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from demo.serving import PLAIN

DRAFT_TOKENS = 3  # aurora's default K, also for n-gram
CHECKPOINT_EVERY_S = 120.0  # the static draft is exported from a checkpoint; each costs some of the learner's CPU share


@dataclass(frozen=True)
class Arm:
    """One way to serve the model."""

    label: str
    arguments: tuple[str, ...]
    is_aurora: bool = False  # answers /aurora/status
    optional: bool = True  # if it does not start, the run continues without it


def arms(checkpoints: Path, static_draft: Path | None) -> dict[str, Arm]:
    """All arms by name.

    Args:
        checkpoints: the learning arm's checkpoint directory.
        static_draft: the EAGLE-3 draft of the arms ``static`` and ``frozen``.
    """
    frozen = ("--aurora-draft", str(static_draft), "--no-aurora-learn")
    return {
        "plain": Arm("plain vLLM", PLAIN, optional=False),
        "ngram": Arm("n-gram", _vllm(method="ngram", prompt_lookup_min=2, prompt_lookup_max=4)),
        "suffix": Arm("suffix decoding", _vllm(method="suffix")),
        # Everything but the learner. The draft is the day-0 one, which seldom pays.
        "copies": Arm("copies alone", ("--no-aurora-learn",), is_aurora=True),
        # With aurora's choice of K, which makes this a stronger baseline: a draft that does not pay is not used.
        "static": Arm("static draft", (*frozen, "--no-aurora-prompt-lookup"), is_aurora=True),
        # Everything but further learning: the difference between aurora and this arm comes from learning.
        "frozen": Arm("static draft and copies", frozen, is_aurora=True),
        "aurora": Arm(
            "aurora",
            (
                *("--aurora-checkpoint-dir", str(checkpoints)),
                *("--aurora-checkpoint-interval-s", str(CHECKPOINT_EVERY_S)),
            ),
            is_aurora=True,
            optional=False,
        ),
        "k0": Arm("speculation off", ("--aurora-speculate", "never", "--no-aurora-learn"), is_aurora=True),
    }


def missing() -> dict[str, str]:
    """Arms that cannot run here, and why."""
    if importlib.util.find_spec("arctic_inference") is None:
        return {"suffix": "arctic-inference is not installed"}
    return {}


def _vllm(**speculative: object) -> tuple[str, ...]:
    tokens = {} if speculative["method"] == "suffix" else {"num_speculative_tokens": DRAFT_TOKENS}
    return (*PLAIN, "--speculative-config", json.dumps(speculative | tokens))
