"""The layout of the weight bank: the specs of its tensors, as JSON in the header, and the sizes that follow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
        """Without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


def bank_bytes(specs: Sequence[TensorSpec], weights_elsewhere: bool = False) -> int:
    """Size of the segment for a bank of these tensors, with or without the weights."""
    header, weights = sizes(specs, encode(specs))
    return header + SLOTS * (EVIDENCE_BYTES if weights_elsewhere else weights + EVIDENCE_BYTES)


def weights_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of other memory for the weights of all slots."""
    return SLOTS * sizes(specs, b"")[1]


def aligned(size: int, to: int) -> int:
    """The next multiple of ``to`` bytes."""
    return -(-size // to) * to


def sizes(specs: Sequence[TensorSpec], encoded: bytes) -> tuple[int, int]:
    """Bytes of the header and of a slot's weights: the tensors, each on a multiple of 64 bytes."""
    weights = sum(aligned(spec.nbytes, ALIGNMENT) for spec in specs)
    return aligned(SPECS_AT + len(encoded), PAGE), aligned(weights, PAGE)


def encode(specs: Sequence[TensorSpec]) -> bytes:
    """The specs as JSON, for the header."""
    return json.dumps([[s.name, list(s.shape), str(s.dtype).removeprefix("torch.")] for s in specs]).encode()


def decode(encoded: bytes) -> list[TensorSpec]:
    """The specs that :func:`encode` wrote."""
    return [TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in json.loads(encoded)]


def check_tensors(tensors: Mapping[str, torch.Tensor], specs: Sequence[TensorSpec]) -> None:
    """See that tensors are those of the specs.

    Raises:
        ValueError: names the tensors that are missing or unknown, or the first one of another shape or dtype.
    """
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - set(tensors)):
        raise ValueError(f"missing tensors: {', '.join(missing)}")
    if extra := sorted(set(tensors) - expected):
        raise ValueError(f"tensors the bank has no place for: {', '.join(extra)}")
    for spec in specs:
        tensor = tensors[spec.name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{spec.name}: {tuple(tensor.shape)} {tensor.dtype}, the bank holds {spec.shape} {spec.dtype}"
            )
