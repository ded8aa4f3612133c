"""A bound on the learner's memory on the target's GPU: if it runs out, the learner loses a batch and vLLM nothing.

vLLM leaves the planned memory free (gpu_plan.py), but allocates while it serves. If the learner took more than planned,
because of a wrong prediction or fragmentation, vLLM could run out of memory, which ends the engine.
"""

from __future__ import annotations

import torch

SPARE = 1.1  # times the plan: takes a little of vLLM's reserve, so that the learner does not fail by a small margin


def bound_gpu_memory(planned: int, device: torch.device) -> None:
    """Have torch raise ``OutOfMemoryError`` in this process rather than allocate more than planned.

    Args:
        planned: bytes of all tensors, without the CUDA context; 0: no bound.
        device: the learner's; only a GPU is bounded.
    """
    if planned and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SPARE * planned / total), device)
