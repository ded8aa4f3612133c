"""A bound on what the learner takes of the target's GPU: where it runs out it loses a batch, and vLLM loses nothing.

vLLM leaves free what the plan says (gpu_plan.py), and it allocates while it serves. A learner that took more than was
planned, by a mistake in the prediction or by fragmentation, would have vLLM run out of memory, which ends the engine.
"""

from __future__ import annotations

import torch

SPARE = 1.1  # times the plan: some of vLLM's own reserve, against a learner that just does not fit


def bound_gpu_memory(planned: int, device: torch.device) -> None:
    """Let torch raise ``OutOfMemoryError`` in this process rather than allocate more.

    Args:
        planned: bytes of all tensors, without the CUDA context; 0: no bound.
        device: of the learner; nothing is done where it is no GPU.
    """
    if planned and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SPARE * planned / total), device)
