"""What Aurora takes of the host's memory beside a vLLM that serves from a CPU, and what vLLM is told to leave it.

On a CPU ``--gpu-memory-utilization`` is a share of the host's memory, or of a container's, and the KV cache gets all of
it that the model leaves (vllm/v1/worker/cpu_worker.py): by default 92 %. Ring, bank and learner on top of that would
have the kernel kill somebody once the cache is full. Arithmetic: asks no machine anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aurora_vllm.gpu_plan import LEAST_SHARE, lowered_utilization
from aurora_vllm.learner.memory import MIB


@dataclass(frozen=True)
class HostPlan:
    """One run's host memory.

    Args:
        total: bytes that vLLM takes its share of.
        asked: ``--gpu-memory-utilization``, given or its default.
        ours: bytes of ring, bank and the learner at its peak.
        kv_cache_given: somebody said how large the KV cache is, and vLLM ignores the utilization.
    """

    total: int
    asked: float
    ours: int
    kv_cache_given: bool = False

    @property
    def utilization(self) -> float:
        """What vLLM is told: never less than half of what was asked, whatever Aurora takes."""
        if self.kv_cache_given:
            return self.asked
        return max(lowered_utilization(self.asked, self.ours, self.total), LEAST_SHARE * self.asked)

    @property
    def why(self) -> str:
        """In words."""
        need = f"{self.ours / MIB:.0f} MiB"
        if self.kv_cache_given:
            return f"{need} must be free beside vLLM, whose KV cache is as large as was said"
        return f"{need} for Aurora: --gpu-memory-utilization {self.asked:g} becomes {self.utilization:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"asked": self.asked, "told": self.utilization}
        return {"total_bytes": self.total, "bytes": self.ours, "why": self.why, "gpu_memory_utilization": told}
