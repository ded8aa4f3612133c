"""Measures how long work takes on the host and on the device, and whether the host waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

HEAD_START, LONG = 20_000_000, 1_000_000_000  # cycles to keep a GPU busy: about 10 ms, and half a second


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that a `share` of all samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def elapsed_us(device: str, work: Callable[[], None]) -> tuple[float, float]:
    """Microseconds that the host was busy with the work, and that the device took for it.

    The device begins only when the host is done, as in a server whose host is ahead of its GPU. Otherwise the device's
    time would include waiting for the host.
    """
    if device == "cpu":
        started = time.perf_counter()
        work()
        took = 1e6 * (time.perf_counter() - started)
        return took, took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    started = time.perf_counter()
    work()
    took = 1e6 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return took, 1000 * begin.elapsed_time(end)


def host_waits(device: str, work: Callable[[], object]) -> bool:
    """Whether the host returns from this work only after the device has finished earlier work.

    ``torch.cuda.set_sync_debug_mode`` does not report every wait. It misses waits in the driver, which stages copies of
    memory that is not pinned.
    """
    if device == "cpu":
        work()
        return False
    torch.cuda.synchronize()
    before = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    before.record()
    work()
    waited = before.query()
    torch.cuda.synchronize()
    return waited
