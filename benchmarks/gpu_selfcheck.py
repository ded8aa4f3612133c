"""Does the transport do on this GPU what it promises? ``python -m benchmarks.gpu_selfcheck [--json FILE]``.

Needs torch only, not vLLM. Two processes over CUDA IPC run the product's own ring, bank, trace writer and swap:
integrity under load, bandwidth, weights swapped under a CUDA graph, what capture costs a step, kill -9 of either side,
and the learner's training step beside a decode load. Without a CUDA device it says so, writes ``"skipped": true`` and
ends with 0; where a target is missed, with 1. WRITTEN AND NEVER RUN on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from aurora_vllm.spec_decode.exchange import AcceleratorExchange, Standing
from aurora_vllm.spec_decode.trace import StepTrace, TraceWriter
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.rows import RowLayout
from aurora_vllm.transport.segment import Segment
from benchmarks import gpu_processes as processes
from benchmarks.gpu_learner import QWEN3_8B, decode_load, learner_beside_a_load
from benchmarks.gpu_ring import kill_recovery, ring_integrity

RING_RATIO, SWAP_P99_MS, CAPTURE_SHARE, STEP_US = 0.8, 2.0, 0.01, 10_000.0  # the targets
HIDDEN = 4096  # Qwen3-8B
LEARNER_ROWS, LOAD_SECONDS = 512, 15.0  # rows of a training step (batch_tokens' default), and of each measurement


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that `share` of all samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """Each target, met or not. found: the sections of a run."""
    ring, swap, capture, kill = (found[name] for name in ("ring", "swap", "capture", "kill"))
    return {
        "ring_integrity": ring["wrong_rows"] == 0 and ring["rows"] == ring["expected_rows"],
        "ring_bandwidth": min(ring["ratio"].values()) >= RING_RATIO,
        "swap_outputs": swap["wrong_outputs"] == 0 and swap["addresses_unchanged"],
        "swap_latency": swap["p99_ms"] < SWAP_P99_MS,
        "capture_cost": max(capture["32"]["host_us"], capture["32"]["device_us"]) <= CAPTURE_SHARE * STEP_US,
        "kill_recovery": all(kill.values()),
    }


def elapsed_us(device: str, work: Callable[[], None]) -> tuple[float, float]:
    """Microseconds the host was busy with the work, and those the device took from its first to its last part."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        took = 1e6 * (time.perf_counter() - started)
        return took, took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    started = time.perf_counter()
    work()
    took = 1e6 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return took, 1000 * begin.elapsed_time(end)


def ring_bandwidth(device: str, row_bytes: int, commits: Sequence[int], rounds: int = 20) -> dict[str, Any]:
    """Copy a batch into the ring and publish it, against the same copies into a plain tensor. GB/s by rows a commit."""
    found: dict[str, Any] = {"gb_per_s": {}, "copy_gb_per_s": {}, "ratio": {}}
    for rows in commits:
        capacity = rows * 16
        producer, names = processes.make_ring(device, row_bytes, capacity)
        consumer = RingConsumer(Segment.attach(names[0]), producer.memory if names[1] else None)
        source = torch.ones((rows, row_bytes), dtype=torch.uint8, device=device)
        plain = torch.empty((capacity, row_bytes), dtype=torch.uint8, device=device)

        def through_the_ring(rows: int = rows, producer: Any = producer, source: torch.Tensor = source) -> None:
            for _ in range(16):
                for view in producer.reserve(rows) or ():
                    view.copy_(source[: len(view)], non_blocking=True)
                producer.commit()

        def into_a_tensor(rows: int = rows, plain: torch.Tensor = plain, source: torch.Tensor = source) -> None:
            for i in range(16):
                plain[i * rows : (i + 1) * rows].copy_(source, non_blocking=True)

        ring_us, copy_us = [], []
        for _ in range(rounds):
            ring_us.append(elapsed_us(device, through_the_ring)[1])
            copy_us.append(elapsed_us(device, into_a_tensor)[1])
            consumer.read(capacity)
        processes.remove(names)
        size, ring, copy = capacity * row_bytes, percentile(ring_us, 0.5), percentile(copy_us, 0.5)
        found["gb_per_s"][str(rows)] = size / ring / 1e3
        found["copy_gb_per_s"][str(rows)] = size / copy / 1e3
        found["ratio"][str(rows)] = copy / ring
    return found


def head_specs(hidden: int, mlp: int, vocabulary: int, dtype: torch.dtype) -> list[TensorSpec]:
    """The matrices of an EAGLE-3 head, q/k/v and gate/up fused as vLLM has them (grouped queries: 4 to 1)."""
    shapes = {
        "fc": (hidden, 3 * hidden),
        "qkv": (hidden + hidden // 2, 2 * hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * mlp, hidden),
        "down": (hidden, mlp),
        "lm_head": (vocabulary, hidden),
    }
    return [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]


def head_forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Every matrix multiplies something (no attention, no norms). x: [n, 3H] -> [n, vocabulary]"""
    hidden = x.shape[1] // 3
    h = x @ weights["fc"].T
    qkv = torch.cat([h, h], dim=1) @ weights["qkv"].T
    h = h + qkv[:, :hidden] @ weights["o"].T
    gate, up = (h @ weights["gate_up"].T).chunk(2, dim=1)
    return (h + (torch.nn.functional.silu(gate) * up) @ weights["down"].T) @ weights["lm_head"].T


def swap_under_a_graph(device: str, specs: list[TensorSpec], swaps: int) -> dict[str, Any]:
    """Another process publishes two versions; here they go live in turn between replays of one captured graph."""
    bank, names = processes.make_bank(device, specs)
    process, pipe = processes.start(processes.publish, names, [1, 2])
    published_s = pipe.recv()
    process.join()
    live = processes.weights(specs, 0, torch.device(device))
    x = torch.randn((4, specs[0].shape[1]), device=device).to(specs[0].dtype)
    started = time.perf_counter()
    read = {version: bank.read(version) for version in (1, 2)}
    read_s = (time.perf_counter() - started) / 2
    bank.hold(live=2, previous=1)
    expected = {version: head_forward(publication.tensors, x) for version, publication in read.items()}
    replay, output = processes.captured(device, lambda: head_forward(live, x))
    tensors = list(live.values())
    addresses = [tensor.data_ptr() for tensor in tensors]
    standing = Standing(list(read[1].tensors.values()))
    torch._foreach_copy_(tensors, standing.tensors)
    exchange = AcceleratorExchange(tensors, list(read[2].tensors.values()), standing)
    host_us, device_us, wrong, furthest = [], [], 0, 0.0
    for i in range(swaps):
        busy, took = elapsed_us(device, exchange)
        host_us.append(busy)
        device_us.append(took)
        replay()
        difference = float((output() - expected[2 - i % 2]).abs().max())
        scale = float(expected[2 - i % 2].abs().max())
        wrong += difference > 1e-2 * scale
        furthest = max(furthest, difference / scale)
    valid = all(publication.still_valid() for publication in read.values())
    processes.remove(names)
    return {
        "swaps": swaps,
        "mib": sum(spec.nbytes for spec in specs) / 2**20,
        "p50_ms": percentile(device_us, 0.5) / 1000,
        "p99_ms": percentile(device_us, 0.99) / 1000,
        "host_p99_us": percentile(host_us, 0.99),
        "wrong_outputs": wrong + (not valid),
        "largest_relative_difference": furthest,
        "addresses_unchanged": [tensor.data_ptr() for tensor in tensors] == addresses,
        "publish_s": published_s,
        "read_s": read_s,
    }


def capture_cost(device: str, hidden: int, batches: Sequence[int], steps: int = 50, drafts: int = 3) -> dict[str, Any]:
    """What TraceWriter.write costs in a step that verifies three drafts a request, by requests in the batch."""
    layout = RowLayout(hidden, 3, torch.bfloat16)
    found = {}
    for batch in batches:
        rows = batch * (drafts + 1)
        producer, names = processes.make_ring(device, layout.row_bytes, 8 * (rows + batch))
        consumer = RingConsumer(Segment.attach(names[0]), producer.memory if names[1] else None)
        counters = SimpleNamespace(requests_seen=0, requests_captured=0, requests_dropped=0, rows_written=0)
        control: Any = SimpleNamespace(worker=counters)
        writer = TraceWriter(producer, layout, control, seed=0)
        for i in range(batch):
            writer.begin(str(i), prompt_length=5, temperature=0.0, may_learn=True)
        trace = _step(device, hidden, batch, drafts)
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
            "rows_written": counters.rows_written,
        }
    return found


def _step(device: str, hidden: int, batch: int, drafts: int) -> StepTrace:
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


def check(device: str) -> dict[str, Any]:
    """Everything, at the sizes of a real model. A few minutes on one GPU."""
    row_bytes = RowLayout(HIDDEN, 3, torch.bfloat16).row_bytes
    found: dict[str, Any] = {"ring": ring_integrity(device, 1_000_000, row_bytes, 16_384, 256)}
    found["ring"] |= ring_bandwidth(device, row_bytes, (128, 2048))
    found["swap"] = swap_under_a_graph(device, head_specs(HIDDEN, 12_288, 32_000, torch.bfloat16), 1000)
    found["capture"] = capture_cost(device, HIDDEN, (1, 8, 32, 64))
    found["kill"] = kill_recovery(device, row_bytes, 64)
    load = decode_load(device, 8192, 64)  # 8 GiB
    found["learner"] = learner_beside_a_load(device, QWEN3_8B, LEARNER_ROWS, load, LOAD_SECONDS)
    return found | {"met": verdicts(found)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_selfcheck", description="Needs one CUDA device.")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"skipped": not torch.cuda.is_available(), "torch": torch.__version__}
    if result["skipped"]:
        result["why"] = "no CUDA device here"
    else:
        started = time.perf_counter()
        result |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        result |= check(f"cuda:{torch.cuda.current_device()}")
        result["seconds"] = time.perf_counter() - started
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if result["skipped"] or all(result["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
