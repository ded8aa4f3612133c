"""From the host to the device in the middle of a step, without waiting for either."""

from __future__ import annotations

from array import array

import torch

DTYPES = {"i": torch.int32, "q": torch.int64}


def upload(values: array[int], device: torch.device) -> torch.Tensor:
    """A flat tensor of these values, int32 or int64 as the array is. On a CPU it shares their memory.

    A plain copy to a GPU waits until the stream has come to it, and of larger ones (64 KiB) so does a "non-blocking"
    one, unless what it reads is pinned. Torch keeps pinned blocks, and gives one out again when the copy from it is
    done.
    """
    dtype = DTYPES[values.typecode]
    on_host = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
    if device.type == "cuda":
        on_host = torch.empty(len(values), dtype=dtype, pin_memory=True).copy_(on_host)
    return on_host.to(device, non_blocking=True)
