"""The draft's own KV cache, emptied where the weights that wrote it are not those that will read it.

A lesson, or a draft from disk, makes another draft of the running one: keys and values by the old weights mislead the
new ones, in running requests and, for as long as a prompt is cached, behind every request that begins with it. Rows of
zeros say nothing, as where nothing was drafted (measured: ``benchmarks/swap_dip.py``). Steps in between change a draft
little, and keep their KV. The target's KV is untouched, so no answer changes and no prompt is computed anew.
"""

from __future__ import annotations

from typing import Any

import torch


class DraftKv:
    """KV of a running draft.

    Args:
        draft, target: vLLM's models. Their attention layers hold the caches as ``kv_cache``, from the time they are
            allocated on; so they are looked up when needed.
    """

    def __init__(self, draft: Any, target: Any) -> None:
        self._draft, self._target = draft, target

    @torch.inference_mode()
    def drop(self) -> bool:
        """Zero it, on the current stream. Returns whether that could be done: where layers of several kinds share a
        tensor (vLLM's hybrid KV cache groups), rows of the target lie in it too, and it stays as it is."""
        mine, theirs = _caches(self._draft), _caches(self._target)
        if {cache.data_ptr() for cache in mine} & {cache.data_ptr() for cache in theirs}:
            return False
        for cache in mine:
            cache.zero_()
        return bool(mine)


def _caches(model: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        held = getattr(module, "kv_cache", None)
        tensors = held if isinstance(held, list | tuple) else [held]
        found += [one for one in tensors if isinstance(one, torch.Tensor) and one.numel()]
    return found
