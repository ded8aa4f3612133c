"""What Triton 3.9's interpreter cannot do of vLLM's kernels for probabilistic drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def repair() -> None:
    """Masks of any integer type, and the three functions of libdevice that the rejection sampler calls."""
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    builder, handle, tl = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.tl

    def boolean(mask: Any) -> Any:
        """vLLM combines masks with ``&`` and loads some of them; numpy then has int8, which the loader refuses."""
        return mask if mask.data.dtype == np.bool_ else handle(mask.data.astype(np.bool_), tl.int1)

    load, store = builder.create_masked_load, builder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, boolean(mask), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, boolean(mask), *rest)

    def elementwise(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def interpreted(x: Any) -> Any:
            data = x.handle.data
            return tl.tensor(handle(function(data).astype(data.dtype), x.handle.dtype), x.type)

        return interpreted

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    for name in ("log1p", "expm1", "tanh"):  # bodies of "..." without a GPU: they return None
        setattr(libdevice, name, elementwise(getattr(np, name)))
