"""Copies by compiled kernels, against the self-check's model of them. Written without a GPU: see docs/gpu.md.

In processes of their own (conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import gpu_copies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda:0"


def kind_of_kernel() -> str:
    from aurora_vllm.spec_decode import copy_kernels

    return type(copy_kernels.propose_kernel).__name__


def variants() -> tuple[int, int]:
    """How often propose_kernel has been compiled, by the rehearsal and after steps."""
    from aurora_vllm.spec_decode import copy_kernels

    decoding = gpu_copies.Decoding(DEVICE, 5, 40, 3, 8)
    cache = copy_kernels.propose_kernel.device_caches[torch.cuda.current_device()][0]
    rehearsed = len(cache)
    for _ in range(8):
        decoding.advance()
        decoding.copy()
    return rehearsed, len(cache)


def test_kernels_are_compiled_here(compiled: Callable[..., Any]) -> None:
    assert compiled(kind_of_kernel) == "JITFunction"


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_copies_and_counts_are_those_of_the_model(compiled: Callable[..., Any], positions: int) -> None:
    """Under set_sync_debug_mode("error"), with prompts of several blocks, over a swap from version 1 to 2."""
    found = compiled(gpu_copies.copies_agree, DEVICE, 16, 600, positions, 16)
    assert (found["proposals"], found["wrong_proposals"], found["wrong_counts"]) == (16 * 16, 0, 0)
    assert found["copied_tokens"] > 50 and found["versions"] == [1, 2]


def test_the_host_waits_neither_for_copies_nor_for_their_counts(compiled: Callable[..., Any]) -> None:
    assert compiled(gpu_copies.copies_wait, DEVICE) == {"host_waits": False, "counts_arrive": True}


def test_nothing_is_compiled_behind_the_rehearsal(compiled: Callable[..., Any]) -> None:
    assert compiled(variants) == (1, 1)


def test_texts_may_lie_in_pinned_memory(compiled: Callable[..., Any]) -> None:
    found = compiled(gpu_copies.copies_cost, DEVICE, (2,), (3,), 200, 20, True)
    assert found["2"]["3"]["device_us"] > 0
