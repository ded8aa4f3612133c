"""Tensors of a safetensors checkpoint, sharded or not, read one at a time."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open


class StoredTensors:
    """A mapping from names to tensors; each is read when it is asked for.

    Args:
        directory: of the checkpoint.

    Raises:
        FileNotFoundError: there are no safetensors files in it.
        ValueError: of ``[name]``, there is no such tensor.
    """

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors files in {directory}")
        self._directory = directory
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self._file_of else None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self._directory} has no tensor {name}")
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
