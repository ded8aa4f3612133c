"""Rows by one compiled kernel, against those by torch's operators. Written without a GPU: see docs/gpu.md.

In processes of their own (conftest.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode.rehearsal import prepare_fill
from aurora_vllm.spec_decode.row_fill import TorchFill
from aurora_vllm.transport.rows import RowLayout
from benchmarks import gpu_capture
from tests.unit.capture_world import layout_of, step_of, writer_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda:0"


def steps_that_differ(layouts: int) -> tuple[set[str], int, int]:
    """Who writes the rows behind the rehearsal; how many rows were compared, and in how many layouts they differ."""
    rng, ways, rows, wrong = random.Random(0), set(), 0, 0
    device = torch.device(DEVICE)
    for layout in [RowLayout(4096, 3, torch.bfloat16), RowLayout(4100, 3, torch.float32)] + [
        layout_of(rng) for _ in range(layouts)
    ]:
        fill = prepare_fill(layout, device, device, 64)
        ways.add(fill.name)
        steps = [step_of(rng, layout, DEVICE) for _ in range(5)]
        found = []
        for way in (fill, TorchFill(layout)):
            writer, sink = writer_of(layout, way, DEVICE, opted_out=4)
            torch.cuda.set_sync_debug_mode("error")
            for step in steps:
                writer.write(step)
            writer.end("r0")
            writer.flush_ends()
            torch.cuda.set_sync_debug_mode("default")
            found.append(sink.all())
        rows += len(found[0])
        wrong += not torch.equal(*found)
    return ways, rows, wrong


def variants() -> tuple[int, int]:
    """How often the kernel has been compiled, by the rehearsal and after steps."""
    from aurora_vllm.spec_decode.capture_kernel import capture_kernel

    rng, layout, device = random.Random(1), RowLayout(64, 3, torch.bfloat16), torch.device(DEVICE)
    fill = prepare_fill(layout, device, device, 64)
    cache = capture_kernel.device_caches[torch.cuda.current_device()][0]
    rehearsed = len(cache)
    writer, _ = writer_of(layout, fill, DEVICE, opted_out=2)
    for _ in range(50):
        writer.write(step_of(rng, layout, DEVICE))
    return rehearsed, len(cache)


def test_rows_are_those_of_torch(compiled: Callable[..., Any]) -> None:
    """Under set_sync_debug_mode("error"), over steps of every kind."""
    ways, rows, wrong = compiled(steps_that_differ, 30)
    assert ways == {"one kernel"} and rows > 500 and not wrong


def test_nothing_is_compiled_behind_the_rehearsal(compiled: Callable[..., Any]) -> None:
    assert compiled(variants) == (1, 1)


def test_the_host_does_not_wait_for_rows_by_the_kernel(compiled: Callable[..., Any]) -> None:
    assert not compiled(gpu_capture.capture_waits, DEVICE, 512)["host_waits"]
    assert compiled(gpu_capture.capture_cost, DEVICE, 512, (8,), 5)["8"]["rows_by"] == "one kernel"
