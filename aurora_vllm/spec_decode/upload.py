"""Copies from the host to the device in the middle of a step, without waiting."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SMALLEST = 64  # bytes of the least pinned block that is reserved: an end row's


def upload(values: array[int] | NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of these values on the device, of their dtype (int32 or int64) and shape. On a CPU it shares their
    memory.

    A plain copy to a GPU waits until the stream reaches it. From 64 KiB on so does a "non-blocking" one, unless its
    source is pinned. Torch caches pinned blocks, and reuses one when the copy from it is done.
    """
    on_host = torch.from_numpy(np.asarray(values))
    if device.type == "cuda":
        on_host = torch.empty(on_host.shape, dtype=on_host.dtype, pin_memory=True).copy_(on_host)
    return on_host.to(device, non_blocking=True)


def reserve_pinned(largest: int, device: torch.device, blocks: int = 4) -> None:
    """Have torch cache pinned blocks for uploads of up to this many bytes, so that serving does not wait for new ones.

    Pinning takes the driver milliseconds. Torch caches blocks by size, in powers of two; a few of each are needed,
    since the host is ahead of its GPU by a step or two.
    """
    if device.type != "cuda":
        return
    sizes = [SMALLEST]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(blocks)]
    del held  # all at once: a block freed earlier would be handed out again as the next one
