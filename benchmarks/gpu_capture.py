"""The self-check of capture: what TraceWriter.write costs per step, and whether the host waits in it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from aurora_vllm.spec_decode.rehearsal import prepare_fill
from aurora_vllm.spec_decode.trace import COUNTERS, StepTrace, TraceWriter
from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.rows import RowLayout
from aurora_vllm.transport.segment import Segment
from benchmarks import gpu_processes as processes
from benchmarks.gpu_timing import elapsed_us, host_waits, percentile


def capture_cost(device: str, hidden: int, batches: Sequence[int], steps: int = 50, drafts: int = 3) -> dict[str, Any]:
    """What TraceWriter.write costs in a step that verifies ``drafts`` tokens per request, by requests in the batch.

    ``rows_by`` says what wrote the rows: one kernel or, if that failed its rehearsal, torch in a dozen launches.
    """
    found = {}
    for batch in batches:
        rows = batch * (drafts + 1)
        writer, consumer, names = _writer(device, hidden, 8 * (rows + batch))
        for i in range(batch):
            writer.begin(str(i), prompt_length=5, temperature=0.0, may_learn=True)
        trace = step_of(device, hidden, batch, drafts)
        host_us, device_us = [], []
        for step in range(steps + 5):
            busy, took = elapsed_us(device, lambda writer=writer, trace=trace: writer.write(trace))  # type: ignore[misc]
            consumer.read(rows)
            if step >= 5:  # warm
                host_us.append(busy)
                device_us.append(took)
        processes.remove(names)
        found[str(batch)] = {
            "host_us": percentile(host_us, 0.5),
            "device_us": percentile(device_us, 0.5),
            "host_p99_us": percentile(host_us, 0.99),
            "rows_a_step": rows,
            "rows_by": writer.rows_by,
            "rows_written": writer.control.worker.rows_written,
        }
    return found


def capture_waits(device: str, hidden: int, batch: int = 512, drafts: int = 3) -> dict[str, Any]:
    """Whether the host waits in a large step after the end of a request, with another request that is not captured.

    As in a server, capture has been rehearsed and pinned memory is allocated. Two steps are made before, one of them
    after the end of a request.
    """
    rows = batch * (drafts + 1)
    writer, _, names = _writer(device, hidden, 3 * (rows + batch))
    for i in range(batch):
        writer.begin(str(i), prompt_length=5, temperature=0.0, may_learn=i != 7)
    trace = step_of(device, hidden, batch, drafts)
    writer.write(trace)
    writer.end("1")
    writer.write(trace)
    writer.end("0")
    waits = host_waits(device, lambda: writer.write(trace))
    processes.remove(names)
    return {"host_waits": waits, "rows_written": writer.control.worker.rows_written}


def step_of(device: str, hidden: int, batch: int, drafts: int) -> StepTrace:
    """A decode step in which one draft token is accepted for each request."""
    rows = batch * (drafts + 1)
    states = [torch.ones((rows, hidden), dtype=torch.bfloat16, device=device) for _ in range(4)]
    sampled = torch.ones((batch, drafts + 1), dtype=torch.int32, device=device)
    sampled[:, 2:] = -1
    return StepTrace(
        request_ids=[str(i) for i in range(batch)],
        lengths=[drafts + 1] * batch,
        num_drafts=[drafts] * batch,
        emits=[True] * batch,
        token_ids=torch.arange(rows, device=device),
        positions=torch.arange(rows, device=device),
        aux_hidden_states=states[:3],
        last_hidden_states=states[3],
        sampled=sampled,
        draft_version=1,
    )


def _writer(device: str, hidden: int, capacity: int) -> tuple[TraceWriter, RingConsumer, processes.Names]:
    layout = RowLayout(hidden, 3, torch.bfloat16)
    producer, names = processes.make_ring(device, layout.row_bytes, capacity)
    consumer = RingConsumer(Segment.attach(names[0]), producer.memory if names[1] else None)
    control: Any = SimpleNamespace(worker=SimpleNamespace(**dict.fromkeys(COUNTERS, 0)))
    fill = prepare_fill(layout, producer.device, torch.device(device), capacity)
    return TraceWriter(producer, layout, control, seed=0, fill=fill), consumer, names
