"""What goes from the host to the device in a step, and the pinned memory kept for it."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from aurora_vllm.spec_decode import upload as module
from aurora_vllm.spec_decode.upload import reserve_pinned, upload


@pytest.mark.parametrize(("code", "dtype"), [("i", torch.int32), ("q", torch.int64)])
def test_what_is_uploaded_arrives(code: str, dtype: torch.dtype) -> None:
    for values in ([], [3, -1, 2**31 - 1]):
        assert torch.equal(upload(array(code, values), torch.device("cpu")), torch.tensor(values, dtype=dtype))


def test_what_is_uploaded_has_its_shape() -> None:
    words = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert torch.equal(upload(words, torch.device("cpu")), torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32))


def test_blocks_of_every_size_are_held_at_once_and_then_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    most: list[int] = []

    class Block:
        def __init__(self, size: int, **kwargs: Any) -> None:
            assert kwargs == {"dtype": torch.uint8, "pin_memory": True}
            self._size = size
            held.append(size)
            most[:] = max(most, held, key=len)

        def __del__(self) -> None:
            held.remove(self._size)

    monkeypatch.setattr(module.torch, "empty", Block)
    reserve_pinned(1000, torch.device("cuda"), blocks=2)
    assert most == [64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024] and not held


def test_a_cpu_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch, "empty", lambda *_, **__: pytest.fail("pinned"))
    reserve_pinned(1000, torch.device("cpu"))
