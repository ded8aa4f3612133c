"""Two places that trade contents, as a running draft keeps its weights: plain, fused on a GPU, packed on a CPU.

Called between two steps; what is staged becomes live, and what was live is kept for the way back. None can fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Exchange(Protocol):
    """Two places that trade contents."""

    def __call__(self) -> None: ...


@dataclass
class TensorExchange:
    live: torch.Tensor
    staged: torch.Tensor

    def __call__(self) -> None:
        kept = self.live.clone()
        self.live.copy_(self.staged)
        self.staged.copy_(kept)


@dataclass
class Standing:
    """Tensors outside the model that hold what is live now; shared by a draft's exchanges of one dtype."""

    tensors: list[torch.Tensor]


@dataclass
class AcceleratorExchange:
    """The parameters of one dtype on an accelerator in one go, by a fused copy on the current stream.

    The content that leaves needs no copy: the tensors it once came from still hold it. So a swap reads and writes every
    byte once and needs no memory of its own, which on a serving GPU there may not be. `staged` and the standing tensors
    must stay as they are while they are one of the two.
    """

    live: list[torch.Tensor]
    staged: list[torch.Tensor]  # of the same shapes and dtypes, on the same device
    standing: Standing

    @torch.inference_mode()
    def __call__(self) -> None:
        torch._foreach_copy_(self.live, self.staged, non_blocking=True)
        for tensor in self.staged:
            if tensor.is_cuda:  # staged on another stream: its memory is not to be reused before this copy is done
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.staged, self.standing.tensors = self.standing.tensors, self.staged


@dataclass
class HandlerExchange:
    """vLLM's CPU linear multiplies through a oneDNN handler that holds repacked weights; the layer's own weight is
    empty by then. The handler's address lies in a one-element tensor that compiled code reads at every call
    (vllm._custom_ops.CPUDNNLGEMMHandler), so trading the two addresses trades the weights."""

    live: Any
    staged: Any  # owns the weights that are not live: its destructor frees them

    def __call__(self) -> None:
        kept = self.live.handler_tensor.clone()
        self.live.handler_tensor.copy_(self.staged.handler_tensor)
        self.staged.handler_tensor.copy_(kept)
