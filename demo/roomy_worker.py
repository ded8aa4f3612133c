"""vLLM's worker with room for its frames, and nothing else of Aurora's: plain vLLM without an accident of CPython's.

For baselines: on a CPU plain vLLM 0.32 runs at the edge of a chunk of CPython's frame stack, which makes its steps up
to a quarter longer. Whoever compares speculation with that would count the difference as a gain of speculation.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from aurora_vllm.spec_decode.frame_stack import with_room


class RoomyWorker(CPUWorker):
    """``--worker-cls demo.roomy_worker.RoomyWorker``"""

    @with_room
    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        return super().execute_model(*args, **kwargs)

    @with_room
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return super().sample_tokens(*args, **kwargs)
