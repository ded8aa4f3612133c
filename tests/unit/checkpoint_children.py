"""The saving process in the checkpoint tests; it is killed in the middle. Imports only what a child needs.

Every number in a checkpoint of this process is the checkpoint's own number, so that a mixture of two would show.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from aurora_vllm.learner import checkpoints, staging
from aurora_vllm.learner.checkpoints import Checkpoints
from aurora_vllm.learner.draft import Eagle3Config, Eagle3Draft

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


def save_for_ever(directory: str, kill_at_line: int = 0) -> None:
    """Save checkpoints without end; kill -9 before the n-th line of the saving code after the first two."""
    made = Checkpoints(Path(directory), "run", {"command": []})
    number = 1
    while True:
        if number == 3 and kill_at_line:
            _kill_at(kill_at_line)
        made.save(*state(number))
        number += 1


def _kill_at(n: int) -> None:
    left = n

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename in FILES else None)
