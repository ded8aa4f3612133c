"""Memory that returns to the system when it is freed.

The replay holds hundreds of trajectories of different sizes and evicts the oldest. In the heap they would leave gaps
that the next ones seldom fit into, so a learner would grow beyond what :mod:`.memory` predicts.
"""

from __future__ import annotations

import mmap

import torch

LEAST_BYTES = 64 << 10  # a smaller tensor leaves a small gap, and the number of mappings is limited


def copy_to_own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU, mapped for itself; an ordinary copy where it is small or no mapping can be made."""
    if tensor.nbytes < LEAST_BYTES:
        return tensor.clone()
    try:
        pages = mmap.mmap(-1, tensor.nbytes)
    except OSError:  # too many of them (vm.max_map_count)
        return tensor.clone()
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)  # keeps `pages` until freed
