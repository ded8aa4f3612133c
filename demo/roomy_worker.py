"""vLLM's worker with room for its frames, and nothing else of Aurora's: plain vLLM without an accident of CPython's.

For baselines: on a CPU plain vLLM 0.32 runs at the edge of a chunk of CPython's frame stack, which makes its steps up
to a quarter longer. Whoever compares speculation with that would count the difference as a gain of speculation.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from aurora_vllm.spec_decode.frame_stack import with_roomy_steps


@with_roomy_steps
class RoomyWorker(CPUWorker):
    """``--worker-cls demo.roomy_worker.RoomyWorker``"""
