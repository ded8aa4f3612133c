"""What Aurora takes on the target's GPU, and the lower share that vLLM is told to take. Arithmetic: asks no device."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from aurora_vllm.learner.memory import MIB, GpuMemory

LEAST_SHARE = 0.5  # of what vLLM was to have: where Aurora would leave it less, the learner stays off the GPU


def lowered_utilization(asked: float, ours: int, total: int) -> float:
    """The share ``asked`` of ``total`` bytes, less ``ours`` bytes; rounded down to thousandths."""
    return min(asked, math.floor((asked - ours / total) * 1000 + 1e-6) / 1000)


@dataclass(frozen=True)
class GpuPlan:
    """One run's GPU. vLLM takes the share ``--gpu-memory-utilization`` of the whole memory, whatever else uses it; so
    this share is lowered by what Aurora takes, and both together take what the user asked for.

    Args:
        total: bytes of the GPU.
        asked: vLLM's ``--gpu-memory-utilization``, given or its default.
        memory: what Aurora takes.
        kv_cache_given: ``--kv-cache-memory-bytes`` is set, so vLLM ignores the utilization.
        refused: why the GPU must not be used; empty where it may be.
    """

    total: int
    asked: float
    memory: GpuMemory
    kv_cache_given: bool = False
    refused: str = ""

    @property
    def lowered(self) -> float:
        """See :func:`lowered_utilization`."""
        return lowered_utilization(self.asked, self.memory.total, self.total)

    @property
    def used(self) -> bool:
        """Whether ring, bank and learner go on the GPU."""
        return not self.refused and (self.kv_cache_given or self.lowered >= LEAST_SHARE * self.asked)

    @property
    def utilization(self) -> float:
        """The share that vLLM is told to take."""
        return self.lowered if self.used and not self.kv_cache_given else self.asked

    @property
    def why(self) -> str:
        """The decision in words."""
        need = f"{self.memory.total / MIB:.0f} MiB"
        if self.refused:
            return f"not used, {self.refused}: ring and bank in POSIX shared memory, learner on the CPU"
        if not self.used:
            return (
                f"not used: Aurora's {need} would leave vLLM less than half of what it was to have; ring and bank in "
                "POSIX shared memory, learner on the CPU"
            )
        if self.kv_cache_given:
            return f"{need} must be free beside vLLM: with --kv-cache-memory-bytes it ignores --gpu-memory-utilization"
        return f"{need} for Aurora: --gpu-memory-utilization {self.asked:g} becomes {self.utilization:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "total_bytes": self.total,
            "used": self.used,
            "why": self.why,
            "bytes": self.memory.total,
            "parts": asdict(self.memory),
            "gpu_memory_utilization": {"asked": self.asked, "told": self.utilization},
        }
