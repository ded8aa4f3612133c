"""The live draft, whose weights are exchanged with those of a published version between two steps.

A swap is an *exchange*: every live tensor trades its content with a staged one. Addresses stay, so compiled code and
CUDA graphs stay valid, and a second exchange is the rollback. On a GPU the copies are enqueued on the current stream,
the model's, so they come between two steps there, too, and the host does not wait. Whatever is known to fail (reading
the bank, checksum, shape, dtype, finiteness, memory, packing for the CPU) is done while staging, on another thread; if
the exchange itself fails, it is undone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aurora_vllm.spec_decode.draft_layout import Destination, SwapRefused, destinations_in
from aurora_vllm.spec_decode.exchange import (
    AcceleratorExchange,
    Exchange,
    HandlerExchange,
    StagedWeights,
    Standing,
    TensorExchange,
)
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.waits import wait_for_this_stream


class LiveDraft:
    """The running EAGLE-3 draft of one worker.

    Args:
        draft: vLLM's ``Eagle3LlamaForCausalLM`` (or a class of the same layout).
        target: the target model; used only to detect shared modules.

    Raises:
        SwapRefused: the draft shares its ``lm_head`` with the target, is quantised, or has a layer whose weights are
            not accessible.
    """

    def __init__(self, draft: Any, target: Any) -> None:
        if _shares(draft.lm_head, getattr(target, "lm_head", None)):
            raise SwapRefused("the draft's lm_head is the target's own module; writing it would change the target")
        self._destinations = destinations_in(draft)
        self._vocab_size = draft.config.vocab_size
        self._parameters = [destination for destination in self._destinations if destination.handler is None]
        self._addresses = [destination.live.data_ptr() for destination in self._parameters]
        self._standing: dict[torch.dtype, Standing] = {}  # on an accelerator, from the first staging on
        self._room = torch.empty(0, dtype=torch.uint8)  # likewise on a CPU

    def check(self, specs: Sequence[TensorSpec]) -> None:
        """Compare a bank's specs with this draft.

        Raises:
            SwapRefused: names the first tensor that is missing, unknown, or of another shape or dtype.
        """
        given = {spec.name: spec for spec in specs}
        wanted = {name for destination in self._destinations for name in destination.sources}
        if set(given) != wanted:
            different = ", ".join(sorted(set(given) ^ wanted))
            raise SwapRefused(f"the bank and the running draft have different tensors: {different}")
        for destination in self._destinations:
            parts = [given[name] for name in destination.sources]
            destination.check([part.shape for part in parts], [part.dtype for part in parts])

    def rehearse(self, specs: Sequence[TensorSpec]) -> None:
        """On an accelerator: stage the live weights and exchange them with themselves, while nothing is served.

        A GPU loads a kernel at its first launch, and for that the host waits until all queued work is done. And if
        there is no room for the standing tensors, this fails now.

        Args:
            specs: of the bank, already checked.
        """
        if not self._parameters or not _on_accelerator(self._parameters[0].live):
            return
        rows = {spec.name: spec.shape[0] for spec in specs}
        tensors: dict[str, torch.Tensor] = {}
        for destination in self._parameters:
            sizes = [rows[name] for name in destination.sources]
            parts = destination.live[: sum(sizes)].split(sizes)  # vLLM pads a vocabulary
            tensors |= zip(destination.sources, parts, strict=True)
        self.stage(0, tensors).exchange()

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor]) -> StagedWeights:
        """Copy, check and pack a version, off the serving path. tensors: checkpoint names -> CPU or device tensors.

        Raises:
            SwapRefused: a tensor is missing, has another shape or dtype, or is not finite; or a live parameter has
                moved, so that captured graphs would read other memory.
        """
        for destination, address in zip(self._parameters, self._addresses, strict=True):
            if destination.live.data_ptr() != address:
                raise SwapRefused(f"{destination.label}: the running draft's parameter has moved")
        exchanges: list[Exchange] = []
        there: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # live and staged, on an accelerator
        for destination in self._destinations:
            weight = self._checked(destination, tensors)
            if destination.handler is not None:
                from vllm import _custom_ops

                packed = _custom_ops.create_onednn_mm(weight.t(), 32)
                exchanges.append(HandlerExchange(destination.handler, packed))
                continue
            live = destination.live
            if _on_accelerator(live):
                there.setdefault(live.dtype, []).append((live, weight.to(live.device)))
            else:
                exchanges.append(TensorExchange(live, weight.to(live.device), self._kept(live)))
        exchanges += [self._fuse(dtype, pairs) for dtype, pairs in there.items()]
        return StagedWeights(version, exchanges)

    def _checked(self, destination: Destination, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A copy of the tensors for a destination, padded like the live tensor. Raises SwapRefused."""
        missing = [name for name in destination.sources if name not in tensors]
        if missing:
            raise SwapRefused(f"{missing[0]}: not in the published version")
        parts = [tensors[name] for name in destination.sources]
        destination.check([tuple(part.shape) for part in parts], [part.dtype for part in parts])
        weight = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        if weight.is_floating_point() and not _is_finite(weight):
            raise SwapRefused(f"{destination.label}: not finite")
        if destination.sources == ("d2t",):
            _check_vocabulary(weight, self._vocab_size)
        lacking = destination.rows - weight.shape[0]
        return torch.cat([weight, weight.new_zeros(lacking, *weight.shape[1:])]) if lacking else weight

    def _kept(self, live: torch.Tensor) -> torch.Tensor:
        """Scratch memory for exchanging one tensor: as large as the largest, and shared by all."""
        if not len(self._room):
            largest = max(destination.live.nbytes for destination in self._parameters)
            self._room = torch.zeros(largest, dtype=torch.uint8)  # zeroed, so that its pages are allocated
        return self._room[: live.nbytes].view(live.dtype).view(live.shape)

    def _fuse(self, dtype: torch.dtype, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Exchange:
        """One exchange for all pairs of one dtype on an accelerator, by a fused copy. Returns when the staged tensors
        are complete."""
        live, staged = [live for live, _ in pairs], [staged for _, staged in pairs]
        if dtype not in self._standing:
            self._standing[dtype] = Standing([tensor.clone() for tensor in live])
        wait_for_this_stream(live[0].device)  # this thread's, not the model's
        return AcceleratorExchange(live, staged, self._standing[dtype])


def _is_finite(weight: torch.Tensor) -> bool:
    """Tested by the largest magnitude, which is NaN if any element is: one pass, and no mask as large as the weight."""
    return not weight.numel() or math.isfinite(torch.linalg.vector_norm(weight, math.inf))


def _on_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def _shares(module: Any, other: Any) -> bool:
    if other is None:
        return False
    if module is other:
        return True
    mine, theirs = getattr(module, "weight", None), getattr(other, "weight", None)
    if mine is None or theirs is None or not mine.numel():
        return False
    return mine.data_ptr() == theirs.data_ptr()


def _check_vocabulary(d2t: torch.Tensor, vocab_size: int) -> None:
    """vLLM scatters logits to these ids: one outside the vocabulary would raise in a step; of two equal ones, one is
    lost."""
    ids = (d2t + torch.arange(len(d2t), device=d2t.device)).unique()
    if len(ids) < len(d2t) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise SwapRefused(f"d2t: not {len(d2t)} different ids of the target's {vocab_size}")
