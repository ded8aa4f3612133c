"""One arm's turn at a slot: send the prompts, and evaluate the server's status before, during and after them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import psutil

from benchmarks.adaptation.client import bench
from benchmarks.adaptation.figures import Window
from benchmarks.adaptation.plan import Slot
from demo.servers import Server, ServerFailed
from demo.watch import Watcher

Sample = tuple[float, int, int]  # seconds since the window began, K, live version


def measure(
    server: Server, arm: str, slot: Slot, number: int, first_request: int, answer_tokens: int, seed: int,
    has_status: bool,
) -> Window:  # fmt: skip
    """Take the turn.

    Args:
        number: the slot's index in the plan.
        first_request: requests sent to the learning arm before this slot.
        has_status: whether the server answers /aurora/status.

    Raises:
        ServerFailed: it answered no request at all.
    """
    samples: list[Sample] = []

    before = server.status() if has_status else {}
    cpu_before = _cpu_seconds(before)
    began = time.monotonic()

    def seen(status: dict[str, Any]) -> None:
        now = time.monotonic() - began
        samples.append((now, status["speculation"]["draft_length"], status["versions"]["live"]))

    watcher = Watcher(server, seen) if has_status else None
    if watcher is not None:
        watcher.start()
    try:
        result = bench(server.url, slot.prompts, slot.concurrency, answer_tokens, slot.temperature, seed)
    finally:
        if watcher is not None:
            watcher.stop()
    after = server.status() if has_status else {}
    if not result["completed"]:
        error = next((text for text in result["errors"] if text), "no reason given").strip().splitlines()[-1]
        raise ServerFailed(f"server {arm} answered none of {len(slot.prompts)} requests: {error}")
    summaries = latencies(result)
    return Window(
        slot=number,
        workload=slot.workload,
        part=slot.part,
        domain=slot.domain,
        concurrency=slot.concurrency,
        temperature=slot.temperature,
        arm=arm,
        first_request=first_request,
        requests=len(slot.prompts),
        failed=result["failed"],
        tokens=result["total_output_tokens"],
        seconds=result["duration"],
        ttft_ms=summaries["ttft_ms"],
        tpot_ms=summaries["tpot_ms"],
        itl_ms=summaries["itl_ms"],
        acceptance_length=result.get("spec_decode_acceptance_length"),
        **account(before, after, samples, result["duration"], _cpu_seconds(after) - cpu_before),
    )


def latencies(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """ttft_ms, tpot_ms and itl_ms of the answered requests, from the lists of vLLM's benchmark."""
    answered = [i for i, tokens in enumerate(result["output_lens"]) if tokens]
    first = [result["ttfts"][i] for i in answered]
    lengths = [result["output_lens"][i] for i in answered]
    per_token = [
        (result["latencies"][i] - result["ttfts"][i]) / (result["output_lens"][i] - 1)
        for i, tokens in zip(answered, lengths, strict=True)
        if tokens > 1
    ]
    gaps = [gap for i in answered for gap in result["itls"][i]]
    return {"ttft_ms": _summary(first), "tpot_ms": _summary(per_token), "itl_ms": _summary(gaps)}


def account(
    before: Mapping[str, Any], after: Mapping[str, Any], samples: Sequence[Sample], seconds: float, cpu_seconds: float
) -> dict[str, Any]:
    """The fields of a Window that come from the server's status; empty if it has none.

    Args:
        before, after: ``GET /aurora/status`` before and after the window.
        samples: taken in between.
        seconds: duration of the window.
        cpu_seconds: the learner's CPU time in it.
    """
    if "versions" not in before or "versions" not in after:
        return {}
    lengths: list[list[float]] = []
    swaps: list[float] = []
    live = before["versions"]["live"]
    for at, draft_length, version in samples:
        if not lengths or lengths[-1][1] != draft_length:
            lengths.append([round(at, 1), draft_length])
        if version != live:
            swaps.append(round(at, 1))
            live = version
    steps = after["speculation"]["steps"] - before["speculation"]["steps"]
    drafted = after["speculation"]["spec_steps"] - before["speculation"]["spec_steps"]
    learner = {}
    if after["learner"]["state"] != "off":
        learner = {
            "cpu_share": max(0.0, cpu_seconds) / seconds,
            "steps": after["learner"]["step"] - before["learner"]["step"],
            "state": after["learner"]["state"],
            "message": after["learner"]["message"],
        }
    return {
        "copied": copied(before["speculation"], after["speculation"]),
        "versions": versions(before["versions"]["acceptance"], after["versions"]["acceptance"]),
        "draft_lengths": lengths,
        "drafting_share": drafted / steps if steps > 0 else None,
        "swaps": swaps,
        "learner": learner,
    }


def versions(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Verifications and acceptance length of each version between two states of the server's table."""
    earlier = {row["version"]: row for row in before}
    rows = []
    for row in after:
        was = earlier.get(row["version"], {})
        drafts = row["num_drafts"] - was.get("num_drafts", 0)
        if drafts > 0:
            accepted = row["num_accepted"] - was.get("num_accepted", 0)
            rows.append({"version": row["version"], "drafts": drafts, "acceptance_length": 1.0 + accepted / drafts})
    return rows


def copied(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The same for copies; empty if there were none."""
    drafts, accepted = (after[name] - before[name] for name in ("copied_drafts", "copied_accepted"))
    return {"drafts": drafts, "acceptance_length": 1.0 + accepted / drafts} if drafts else {}


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    values = np.asarray(seconds or [0.0]) * 1000
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": round(float(values.mean()), 2), "p50": round(float(p50), 2), "p99": round(float(p99), 2)}


def _cpu_seconds(status: Mapping[str, Any]) -> float:
    """CPU time of the learner since its start; 0 without a learner."""
    with suppress(psutil.Error, ValueError):
        if pid := status.get("learner", {}).get("pid"):
            times = psutil.Process(pid).cpu_times()
            return float(times.user + times.system)
    return 0.0
