"""Rotary position embedding in the Hugging Face Llama convention (``rotate_half``: channel k pairs with k + D/2)."""

from __future__ import annotations

import math
from typing import Any

import torch

from aurora_vllm.errors import AuroraError


def inverse_frequencies(head_dim: int, rope: dict[str, Any]) -> torch.Tensor:
    """Angle per position of each pair of channels.

    Args:
        head_dim: D, even.
        rope: ``rope_parameters`` of transformers 5: ``rope_theta``, ``rope_type`` ("default", "linear" or "llama3") and
            that type's factors. Gives the same numbers as vLLM's ``get_rope`` (layers/rotary_embedding).

    Returns:
        float32 [D / 2], radians per position.

    Raises:
        AuroraError: the type is not supported, or a factor is missing.
    """
    kind = rope.get("rope_type", "default")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (float(rope.get("rope_theta", 10000.0)) ** exponents)
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise AuroraError(
            "the draft rotates a part of each head (partial_rotary_factor)", "only whole heads can be trained"
        )
    try:
        if kind == "default":
            return frequencies
        if kind == "linear":
            return frequencies / float(rope["factor"])
        if kind == "llama3":
            return _llama3(frequencies, rope)
    except KeyError as missing:
        raise AuroraError(f"the draft's rope_scaling of type {kind} has no {missing}") from None
    raise AuroraError(f"the draft's rope_scaling is of type {kind!r}", "default, linear and llama3 are supported")


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, with a linear blend in between."""
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)  # within the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns > high).float()
    return (1 - keep) * frequencies / factor + keep * frequencies


def cos_sin(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions: int64 [N]; frequencies: [D / 2] -> cos, sin: float32 [N, 1, D], broadcast over heads."""
    angles = torch.outer(positions.float(), frequencies)  # [N, D / 2]
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [N, heads, D] -> the same, rotated according to its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
