"""A stand-in for the part of vLLM's ``RequestState`` (vllm/v1/worker/gpu/states.py) that copies on the device use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def request_states(tokens: torch.Tensor, total: torch.Tensor, prompts: np.ndarray, vocabulary: int) -> Any:
    """The ``states`` of :class:`aurora_vllm.spec_decode.device_copies.DeviceCopies`.

    Args:
        tokens: int32 [slots, length], each request's tokens so far.
        total: int32 [slots], their number.
        prompts: int [slots], tokens of each prompt.
        vocabulary: size of the vocabulary.
    """
    return SimpleNamespace(
        max_num_reqs=len(tokens), vocab_size=vocabulary, all_token_ids=SimpleNamespace(gpu=tokens),
        total_len=SimpleNamespace(gpu=total), prompt_len=SimpleNamespace(np=prompts),
    )  # fmt: skip
