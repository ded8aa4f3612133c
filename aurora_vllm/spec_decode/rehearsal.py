"""Rehearses capture before anything is served, and chooses how rows are filled.

At its first launch a kernel is compiled by Triton and loaded by the GPU, and at the first upload of a size torch asks
the driver for pinned memory. The host waits for each of these, so they are done now. And the kernel's rows are compared
with torch's, because wrong rows would be learned from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from aurora_vllm.spec_decode.row_fill import RowFill, TorchFill
from aurora_vllm.spec_decode.runner_v2 import emitted_tokens
from aurora_vllm.spec_decode.trace import COUNTERS, StepTrace, TraceWriter
from aurora_vllm.spec_decode.upload import reserve_pinned
from aurora_vllm.transport.rows import META_WORDS, RowLayout

logger = logging.getLogger("vllm.aurora")

HEAD_BYTES = 4096  # more than is uploaded beside the words of a step's rows


def prepare_fill(
    layout: RowLayout, ring: torch.device, target: torch.device, most_rows: int, with_kernel: bool = True
) -> RowFill:
    """The way to fill rows in this server, rehearsed. Does not raise. Takes seconds on a GPU.

    Args:
        layout: of the rows.
        ring, target: devices of the ring's rows and of the target.
        most_rows: the most rows of one step.
        with_kernel: whether the kernel may be loaded.
    """
    by_torch = TorchFill(layout)
    if target.type == "cpu":
        return by_torch
    try:
        reserve_pinned(most_rows * META_WORDS * 4 + HEAD_BYTES, target)
        expected = rehearse(by_torch, layout, ring, target)
        if ring.type != "cuda" or not with_kernel:
            return by_torch  # a kernel cannot write to a ring elsewhere
        from aurora_vllm.spec_decode.capture_kernel import COMPILED, KernelFill

        if not COMPILED:
            raise RuntimeError("Triton interprets its kernels here")
        by_kernel = KernelFill(layout)
        if not torch.equal(rehearse(by_kernel, layout, ring, target), expected):
            raise RuntimeError("it writes other rows than torch does")
    except Exception as error:  # of torch, of Triton, of an unknown device
        logger.warning(
            "aurora: rows are written by torch, in a dozen launches a step; the kernel for that is not used (%s)",
            " ".join(f"{type(error).__name__}: {error}".split()),
        )
        return by_torch
    return by_kernel


def rehearse(fill: RowFill, layout: RowLayout, ring: torch.device, target: torch.device) -> torch.Tensor:
    """Write steps of every kind into scratch rows. Returns these on the host; uint8 [n, row_bytes]."""
    sink = _Scratch(layout, ring)
    control: Any = SimpleNamespace(worker=SimpleNamespace(**dict.fromkeys(COUNTERS, 0)))
    writer = TraceWriter(sink, layout, control, seed=0, fill=fill)
    for name in "abc":
        writer.begin(name, prompt_length=5, temperature=0.0, may_learn=name != "b")
    for integer in (torch.int32, torch.int64):  # vLLM's runners use both
        writer.write(_step(layout, target, integer, "ac", [4, 4], [3, 3], [True, True]))
        writer.write(_step(layout, target, integer, "abc", [5, 1, 4], [0, 0, 3], [False, True, True]))
        writer.write(_step(layout, target, integer, "ac", [1, 1], [0, 0], [True, True]))
    writer.end("a")
    writer.flush_ends()
    return torch.cat(sink.rows).cpu()


def _step(
    layout: RowLayout,
    device: torch.device,
    integer: torch.dtype,
    names: str,
    lengths: Sequence[int],
    num_drafts: Sequence[int],
    emits: Sequence[bool],
) -> StepTrace:
    """A step whose tensors have a different value in each place; the first draft token of each request is accepted."""
    rows, width = sum(lengths), layout.hidden_size
    padded = rows + 2  # the buffers of a CUDA graph have more rows than the step
    values = torch.arange(padded * width, device=device).view(padded, width)
    *aux, last = ((values * (3 + 2 * i) % 509).to(layout.dtype) for i in range(layout.num_aux + 1))
    sampled = torch.arange(1, 1 + 4 * len(names), device=device).view(-1, 4)
    numbers = [1 + min(1, drafts) for drafts in num_drafts]
    return StepTrace(
        request_ids=names,
        lengths=lengths,
        num_drafts=num_drafts,
        emits=emits,
        token_ids=torch.arange(100, 100 + rows, device=device).to(integer),
        positions=torch.arange(200, 200 + rows, device=device).to(integer),
        aux_hidden_states=aux,
        last_hidden_states=last,
        sampled=emitted_tokens(sampled.to(integer), torch.tensor(numbers, dtype=torch.int32).to(device)),
        draft_version=1,
    )


class _Scratch:
    """A ring without a reader; every reservation is in two pieces if possible, as where a ring wraps."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self._row_bytes, self._device = layout.row_bytes, device
        self.rows: list[torch.Tensor] = []

    def free(self) -> int:
        return 1 << 20

    def reserve(self, n: int) -> list[torch.Tensor]:
        rows = torch.zeros((n, self._row_bytes), dtype=torch.uint8, device=self._device)
        self.rows.append(rows)
        return [view for view in (rows[: n // 2], rows[n // 2 :]) if len(view)]

    def commit(self) -> None:
        pass
