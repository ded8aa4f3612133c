"""What Aurora takes of the host's memory where vLLM serves from a CPU, and the lower share that vLLM is told.

On a CPU ``--gpu-memory-utilization`` is a share of the host's memory, or of a container's, 92 % by default; the KV
cache gets what the model leaves of it (vllm/v1/worker/cpu_worker.py). With ring, bank and learner on top of that,
memory would run out once the cache is full, and the kernel would kill a process. Arithmetic: asks no machine.
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
        total: bytes of which vLLM takes its share.
        asked: ``--gpu-memory-utilization``, given or its default.
        ours: bytes of ring, bank and the learner at its peak.
        kv_cache_given: the size of the KV cache is set, so vLLM ignores the utilization.
    """

    total: int
    asked: float
    ours: int
    kv_cache_given: bool = False

    @property
    def utilization(self) -> float:
        """The share that vLLM is told to take: never less than half of what was asked, whatever Aurora takes."""
        if self.kv_cache_given:
            return self.asked
        return max(lowered_utilization(self.asked, self.ours, self.total), LEAST_SHARE * self.asked)

    @property
    def why(self) -> str:
        """The decision in words."""
        need = f"{self.ours / MIB:.0f} MiB"
        if self.kv_cache_given:
            return f"{need} must be free beside vLLM, whose KV cache is as large as was said"
        return f"{need} for Aurora: --gpu-memory-utilization {self.asked:g} becomes {self.utilization:g}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"asked": self.asked, "told": self.utilization}
        return {"total_bytes": self.total, "bytes": self.ours, "why": self.why, "gpu_memory_utilization": told}
