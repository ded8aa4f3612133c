"""A device that is none: tensors that say they lie on "meta", hold their values on the CPU, and do not mix with others.

What a GPU would refuse is refused here: an operation on tensors of two devices, reading values without a copy to the
host. What a GPU allows is allowed: copies, scalars, indices on the host. So code that is to run on a GPU can be run to
its end without one, and shows where it forgot a device; it says nothing of CUDA itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
BETWEEN_DEVICES = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}


class Far(torch.Tensor):
    """A tensor of the device."""

    here: torch.Tensor  # its values

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Far:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.size(), **layout, device=DEVICE)  # type: ignore

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()  # a GPU's tensor copies to the host by itself here


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    near = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.dim()]
    if far and near and name not in BETWEEN_DEVICES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if name in BETWEEN_DEVICES and isinstance(args[0], Far) is False and name.startswith("index") and far:
        raise RuntimeError(f"{func}: indices should be on the same device, or on the host")
    asked = kwargs.get("device")
    given = {key: CPU if key == "device" and value is not None else value for key, value in kwargs.items()}
    result = func(*tree_map(_here, args), **tree_map(_here, given))
    if name == "_to_copy" and asked is not None:
        is_far = torch.device(asked).type == DEVICE.type
    else:
        is_far = bool(far) or (asked is not None and torch.device(asked).type == DEVICE.type)
    if not is_far:
        return result
    known = {id(tensor.here): tensor for tensor in far}  # what an in-place operation returns is what it was given

    def there(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Far(x)

    return tree_map(there, result)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, Far) else x


@contextmanager
def pretend_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within this the device can be used. Autocast does not know it, AdamW's fused step is told that it does."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    make = torch.tensor  # by itself it would make a tensor of "meta" without values, unseen by the mode

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    supported = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, supported.__name__, lambda: [*supported(), DEVICE.type])
    with _Mode():
        yield DEVICE
