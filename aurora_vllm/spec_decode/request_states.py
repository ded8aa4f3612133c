"""vLLM's ``RequestState`` (vllm/v1/worker/gpu/states.py) as far as copies on the device see it, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def request_states(tokens: torch.Tensor, total: torch.Tensor, prompts: np.ndarray, vocabulary: int) -> Any:
    """What :class:`aurora_vllm.spec_decode.device_copies.DeviceCopies` is given.

    Args:
        tokens: int32 [slots, length], each request's text so far.
        total: int32 [slots], tokens of it.
        prompts: int [slots], tokens of its prompt.
        vocabulary: tokens there are.
    """
    return SimpleNamespace(
        max_num_reqs=len(tokens), vocab_size=vocabulary, all_token_ids=SimpleNamespace(gpu=tokens),
        total_len=SimpleNamespace(gpu=total), prompt_len=SimpleNamespace(np=prompts),
    )  # fmt: skip
