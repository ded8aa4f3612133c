"""Does the transport work on this GPU as promised? ``python -m benchmarks.gpu_selfcheck [--json FILE]``.

Needs only torch, not vLLM; copies also need the Triton that comes with torch. Two processes over CUDA IPC run the
product's own ring, bank, trace writer and swap. Checked are integrity under load, bandwidth, weights swapped under a
CUDA graph, the cost of capture per step, kill -9 of either side, and the learner's training step beside a decode load.
Copies run in one process: are they right, and what do they cost per step? Each section has a process of its own,
because after a CUDA error nothing works in that process any more. Without a CUDA device the program says so, writes
``"skipped": true`` and exits with 0; if a target is missed, it exits with 1. WRITTEN AND NEVER RUN on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aurora_vllm.spec_decode.exchange import AcceleratorExchange, Standing
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.rows import RowLayout
from benchmarks import gpu_processes as processes
from benchmarks.gpu_capture import capture_cost, capture_waits
from benchmarks.gpu_copies import copies_agree, copies_cost, copies_wait
from benchmarks.gpu_learner import QWEN3_8B, decode_load, learner_beside_a_load
from benchmarks.gpu_ring import kill_recovery, ring_bandwidth, ring_integrity
from benchmarks.gpu_timing import elapsed_us, host_waits, percentile

RING_RATIO, SWAP_P99_MS, STEP_SHARE, STEP_US = 0.8, 2.0, 0.01, 10_000.0  # the targets
HIDDEN = 4096  # Qwen3-8B
BANDWIDTH_ROWS = 2048  # rows per commit that the target is for; with fewer, the event takes as long as the copy
SECTION_S, ALL_S = 200.0, 460.0  # limits of a section and of all; a GPU is lent for minutes
LEARNER_ROWS, LOAD_SECONDS = 512, 8.0  # rows of a training step (batch_tokens' default); seconds per measurement

Section = dict[str, Any]
TARGETS: dict[str, tuple[str, Callable[[Section], bool]]] = {
    "ring_integrity": ("ring", lambda ring: ring["wrong_rows"] == 0 and ring["rows"] == ring["expected_rows"]),
    "ring_bandwidth": ("bandwidth", lambda found: found["ratio"][str(BANDWIDTH_ROWS)] >= RING_RATIO),
    "swap_outputs": ("swap", lambda swap: swap["wrong_outputs"] == 0 and swap["addresses_unchanged"]),
    "swap_latency": ("swap", lambda swap: swap["p99_ms"] < SWAP_P99_MS),
    "swap_never_waits": ("swap", lambda swap: not swap["host_waits"]),
    "capture_cost": ("capture", lambda found: max(_costs(found["32"])) <= STEP_SHARE * STEP_US),
    "capture_never_waits": ("capture_waits", lambda found: not found["host_waits"]),
    "copies_right": ("copies", lambda found: not _faults(found) and found["copied_tokens"] > 0),
    "copies_cost": ("copies_cost", lambda found: _most_us(found["32"]) <= STEP_SHARE * STEP_US),
    "copies_cost_pinned": ("copies_cost_pinned", lambda found: _most_us(found["32"]) <= STEP_SHARE * STEP_US),
    "copies_never_wait": ("copies_wait", lambda found: not found["host_waits"] and found["counts_arrive"]),
    "kill_recovery": ("kill", lambda kill: all(kill.values())),
}


def _costs(batch: Section) -> tuple[float, float]:
    return batch["host_us"], batch["device_us"]


def _faults(copies: Section) -> int:
    return copies["wrong_proposals"] + copies["wrong_counts"]


def _most_us(batch: Section) -> float:
    """The device's largest cost. The host's is added to a step only if the host is not ahead of its GPU."""
    return max(found["device_us"] for found in batch.values())


def verdicts(found: dict[str, Section]) -> dict[str, bool]:
    """Whether each target is met; not if its section failed. found: the sections so far."""
    return {
        name: "error" not in found[section] and bool(met(found[section]))
        for name, (section, met) in TARGETS.items()
        if section in found
    }


def head_specs(hidden: int, mlp: int, vocabulary: int, dtype: torch.dtype) -> list[TensorSpec]:
    """The matrices of an EAGLE-3 head, with q/k/v and gate/up fused as in vLLM (grouped queries: 4 to 1)."""
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
    """A forward pass that uses every matrix, without attention and norms. x: [n, 3H] -> [n, vocabulary]"""
    hidden = x.shape[1] // 3
    h = x @ weights["fc"].T
    qkv = torch.cat([h, h], dim=1) @ weights["qkv"].T
    h = h + qkv[:, :hidden] @ weights["o"].T
    gate, up = (h @ weights["gate_up"].T).chunk(2, dim=1)
    return (h + (torch.nn.functional.silu(gate) * up) @ weights["down"].T) @ weights["lm_head"].T


def swap_under_a_graph(device: str, specs: list[TensorSpec], swaps: int) -> dict[str, Any]:
    """Another process publishes two versions. Here they go live in turn, between replays of one captured graph."""
    bank, names = processes.make_bank(device, specs)
    process, pipe = processes.start(processes.publish, names, [1, 2])
    published_s = processes.receive(pipe)
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
    waits = host_waits(device, exchange)
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
        "host_waits": waits,
        "addresses_unchanged": [tensor.data_ptr() for tensor in tensors] == addresses,
        "publish_s": published_s,
        "read_s": read_s,
    }


def sections(device: str) -> dict[str, Callable[[], Section]]:
    """All sections, with the sizes of a real model. They take a few minutes on one GPU."""
    row_bytes = RowLayout(HIDDEN, 3, torch.bfloat16).row_bytes
    head = head_specs(HIDDEN, 12_288, 32_000, torch.bfloat16)
    return {
        "ring": lambda: ring_integrity(device, 1_000_000, row_bytes, 16_384, 256),
        "bandwidth": lambda: ring_bandwidth(device, row_bytes, (128, BANDWIDTH_ROWS)),
        "capture": lambda: capture_cost(device, HIDDEN, (1, 8, 32, 64)),
        "capture_waits": lambda: capture_waits(device, HIDDEN),
        "copies": lambda: copies_agree(device, 32, 2000, 8, 48),
        "copies_cost": lambda: copies_cost(device, (1, 8, 32, 64)),
        "copies_cost_pinned": lambda: copies_cost(device, (1, 8, 32, 64), pinned=True),
        "copies_wait": lambda: copies_wait(device),
        "swap": lambda: swap_under_a_graph(device, head, 1000),
        "kill": lambda: kill_recovery(device, row_bytes, 64),
        "learner": lambda: learner_beside_a_load(
            device, QWEN3_8B, LEARNER_ROWS, decode_load(device, 8192, 64), LOAD_SECONDS
        ),  # a load of 8 GiB
    }


def section(device: str, name: str) -> Section:
    return sections(device)[name]()


def check(device: str, keep: Callable[[dict[str, Section]], None]) -> dict[str, Any]:
    """Run each section, even if earlier ones failed. keep: called after each with all results so far."""
    found: dict[str, Any] = {}
    ends = time.perf_counter() + ALL_S
    for name in sections(device):
        started = time.perf_counter()
        found[name] = processes.isolated(max(0.0, min(SECTION_S, ends - started)), section, device, name)
        found[name]["seconds"] = time.perf_counter() - started  # importing torch and the CUDA context included
        keep(found)
    return found | {"met": verdicts(found)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_selfcheck", description="Needs one CUDA device.")
    parser.add_argument("--json", type=Path, help="write the result here as well, after each section")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"skipped": not torch.cuda.is_available(), "torch": torch.__version__}

    def keep(found: dict[str, Any]) -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result | found | {"met": verdicts(found)}, indent=2) + "\n")
        if found:
            name, section = list(found.items())[-1]
            print(f"{name}: {section.get('error', 'done')} ({section['seconds']:.0f} s)", file=sys.stderr, flush=True)

    if result["skipped"]:
        result["why"] = "no CUDA device here"
    else:
        result |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        result |= check(f"cuda:{torch.cuda.current_device()}", keep)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if result["skipped"] or all(result["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
