"""Writes a draft into the weight bank."""

from __future__ import annotations

from typing import Any

import torch

from aurora_vllm.learner.draft import Eagle3Draft, bank_tensors
from aurora_vllm.transport.bank import WeightBank


def publish(bank: WeightBank, version: int, draft: Eagle3Draft, evidence: dict[str, Any]) -> None:
    """Write a draft into the bank, in the bank's dtype. evidence: why, as a JSON object; kept with the version.

    Raises:
        ValueError: a tensor is not finite, or does not fit the bank.
    """
    dtypes = {spec.name: spec.dtype for spec in bank.specs}
    tensors = bank_tensors(draft, dtypes["fc.weight"])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite")
    bank.publish(version, tensors, evidence)
