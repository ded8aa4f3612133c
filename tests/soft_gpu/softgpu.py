"""A GPU made of software: what torch's CUDA build is told to do on one is dispatched for real, and computed on the CPU.

Its kernels do nothing over runtime.c, whose memory is the host's. So behind each operator the CPU's own does the work,
in the same bytes. What is checked that way is torch's: dispatch to a device, types, autocast, autograd's threads, what
it says to ``set_sync_debug_mode("error")``; and of ours what two processes tell each other. Not checked: CUDA, orders
between streams, Triton's kernels and graphs, which do nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
AS_THEY_ARE = ("record_stream", "set_.", "_pin_memory", "is_pinned")  # of memory, not of what lies in it
BY_CONTENT = ("_local_scalar_dense", "equal.default", "nonzero", "unique", "masked_select")  # CUDA's host waits for it

runtime = ctypes.CDLL(None)
torch.cuda._sleep = lambda cycles: runtime.fake_busy(1)


class SoftGpu(TorchDispatchMode):
    """In this thread, and in autograd's, operators on CUDA tensors have their results."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(operator)
        told = tree_leaves((args, kwargs))
        if not any(_is_there(one) for one in told) or any(word in name for word in AS_THEY_ARE):
            return operator(*args, **kwargs)
        returns = operator._schema.returns
        if any(one.alias_info is not None and not one.alias_info.is_write for one in returns):
            return operator(*args, **kwargs)  # a view
        here = tree_map(_here, args), tree_map(_here, kwargs)
        here[1].pop("pin_memory", None)
        if any(word in name for word in BY_CONTENT) or _by_mask(name, args):
            return self._by_content(operator, name, args, here)
        made = operator(*args, **kwargs)
        if "_fused_rms_norm_backward" in name:  # the CPU has none
            found: Any = _rms_norm_backward(*here[0])
        else:
            found = operator(*here[0], **here[1])
        if operator._schema.is_mutable:
            return made
        for there, value in zip(tree_leaves(made), tree_leaves(found), strict=True):
            if isinstance(there, torch.Tensor) and there.numel() and value is not None:
                _here(there).copy_(value)
        return made

    def _by_content(self, operator: Any, name: str, args: Any, here: Any) -> Any:
        if torch.cuda.get_sync_debug_mode() == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")
        torch.cuda.current_stream().synchronize()
        found = operator(*here[0], **here[1])
        if operator._schema.is_mutable:
            return args[0]
        return found if "_local_scalar" in name or "equal" in name else tree_map(_there, found)


def _is_there(one: Any) -> bool:
    device = one.device if isinstance(one, torch.Tensor) else one
    return isinstance(device, torch.device) and device.type == "cuda"


def _by_mask(name: str, args: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return name.startswith("aten.index") and any(
        isinstance(one, torch.Tensor) and one.dtype in masks for one in tree_leaves(args[1])
    )


def _here(one: Any) -> Any:
    """A CUDA tensor's bytes as a tensor of the CPU's; the CPU in a device's place."""
    if isinstance(one, torch.Generator) and one.device.type == "cuda":
        return torch.Generator().manual_seed(one.initial_seed())
    if not _is_there(one):
        return one
    if isinstance(one, torch.device):
        return CPU
    storage = one.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(one.size(), one.stride(), dtype=one.dtype)
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=one.dtype).set_(same, one.storage_offset(), one.size(), one.stride())


def _there(one: Any) -> Any:
    if not isinstance(one, torch.Tensor):
        return one
    made = torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device="cuda")
    if one.numel():
        _here(made).copy_(one)
    return made


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, shape: Any, scale: torch.Tensor, weight: torch.Tensor, mask: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, x, scale = grad.float(), x.float(), scale.float()
    weighed = grad * weight.float()
    grad_x = scale * (weighed - x * scale * scale * (weighed * x).mean(-1, keepdim=True))
    return grad_x, (grad * x * scale).reshape(-1, x.shape[-1]).sum(0)


def softly(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs on it."""

    def method(self: Any) -> Any:
        with SoftGpu():
            return run(self)

    return method


@pytest.fixture(autouse=True)
def soft_gpu() -> Iterator[None]:
    with SoftGpu():
        yield
