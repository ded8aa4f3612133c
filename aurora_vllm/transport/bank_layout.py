"""Where the weight bank's tensors lie: their specs, as JSON in the header, and the sizes that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SLOTS = 3
PAGE = 4096
ALIGNMENT = 64
SPECS_AT = 512  # byte offset of the specs' JSON in the header
EVIDENCE_BYTES = 16384


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor of the bank."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def bank_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of the segment that holds a bank of these tensors."""
    header, slot = sizes(specs, encode(specs))
    return header + SLOTS * slot


def aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def sizes(specs: Sequence[TensorSpec], encoded: bytes) -> tuple[int, int]:
    """Bytes of the header and of one slot: the tensors, each on a multiple of 64 bytes, then the evidence."""
    weights = sum(aligned(spec.nbytes, ALIGNMENT) for spec in specs)
    return aligned(SPECS_AT + len(encoded), PAGE), aligned(weights, PAGE) + EVIDENCE_BYTES


def encode(specs: Sequence[TensorSpec]) -> bytes:
    return json.dumps([[s.name, list(s.shape), str(s.dtype).removeprefix("torch.")] for s in specs]).encode()


def decode(encoded: bytes) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in json.loads(encoded)]
