"""The saving process in the checkpoint tests; it is killed in the middle. Imports only what a child needs.

Every number in a checkpoint of this process is the checkpoint's own number, so that a mixture of two would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aurora_vllm.learner import checkpoints, staging
from aurora_vllm.learner.checkpoints import Checkpoints
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from tests.unit.transport_children import kill_at_line

FILES = (checkpoints.__file__, staging.__file__)
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "vocab_size": 600,
    "draft_vocab_size": 500,
    "num_hidden_layers": 1,
}


def state(number: int) -> tuple[Eagle3Draft, dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Arguments of Checkpoints.save."""
    draft = Eagle3Draft(Eagle3Config.from_hf(CONFIG))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.fill_(number)
    tensors = {f"optimizer.{i}": torch.full((200, 200), float(number)) for i in range(4)}
    return draft, CONFIG, tensors, {"steps": number}


def save_for_ever(directory: str, kill_at: int = 0) -> None:
    """Save checkpoints without end; kill -9 before the n-th line of the saving code after the first two."""
    made = Checkpoints(Path(directory), "run", {"command": []})
    number = 1
    while True:
        if number == 3 and kill_at:
            kill_at_line(kill_at, within=FILES)
        made.save(*state(number))
        number += 1
