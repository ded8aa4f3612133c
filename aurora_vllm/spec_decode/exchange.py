"""Two places that trade contents, as a running draft keeps its weights: plain, fused on a GPU, packed on a CPU.

Called between two steps; what is staged becomes live, and what was live is kept for the way back. Memory for it is
taken while staging, so nothing is known that can fail; what fails all the same is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class HalfExchanged(RuntimeError):
    """An exchange failed and so did undoing it: what is live is of two versions."""


class Exchange(Protocol):
    """Two places that trade contents. Called once more it is its own inverse.

    Whatever a call raises, what is live is then what it was, but for :class:`HalfExchanged`.
    """

    def __call__(self) -> None: ...


@dataclass
class StagedWeights:
    """A version that is ready to go live, or the one that just left."""

    version: int
    exchanges: Sequence[Exchange]

    @torch.inference_mode()
    def exchange(self) -> None:
        """All of it, or nothing.

        Raises:
            HalfExchanged: neither.
            Exception: nothing; what is staged may be spoilt, so it is not to be exchanged again.
        """
        done: list[Exchange] = []

        def undo() -> None:
            for exchange in reversed(done):
                exchange()

        with _undone_by(undo):
            for exchange in self.exchanges:
                exchange()
                done.append(exchange)


@dataclass
class TensorExchange:
    live: torch.Tensor
    staged: torch.Tensor
    kept: torch.Tensor  # room for the content of either; exchanges that come one after the other may share it

    def __call__(self) -> None:
        _trade(self.live, self.staged, self.kept)


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
        # After most errors of CUDA nothing works any more, so undoing it says that, too.
        with _undone_by(lambda: torch._foreach_copy_(self.live, self.standing.tensors, non_blocking=True)):
            torch._foreach_copy_(self.live, self.staged, non_blocking=True)
            for tensor in self.staged:
                if tensor.is_cuda:  # staged on another stream: its memory is not to be reused before this copy is done
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.staged, self.standing.tensors = self.standing.tensors, self.staged


class HandlerExchange:
    """vLLM's CPU linear multiplies through a oneDNN handler that holds repacked weights; the layer's own weight is
    empty by then. The handler's address lies in a one-element tensor that compiled code reads at every call
    (vllm._custom_ops.CPUDNNLGEMMHandler), so trading the two addresses trades the weights.

    Args:
        live: the handler that is called.
        staged: owns the weights that are not live: its destructor frees them.
    """

    def __init__(self, live: Any, staged: Any) -> None:
        self.live, self.staged = live, staged
        self._kept = torch.empty_like(live.handler_tensor)

    def __call__(self) -> None:
        _trade(self.live.handler_tensor, self.staged.handler_tensor, self._kept)


def _trade(live: torch.Tensor, staged: torch.Tensor, kept: torch.Tensor) -> None:
    kept.copy_(live)
    with _undone_by(lambda: live.copy_(kept)):
        live.copy_(staged)
        staged.copy_(kept)


@contextmanager
def _undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Where what is done within this fails, it is undone and the error goes on.

    Raises:
        HalfExchanged: undoing it failed, too.
    """
    try:
        yield
    except Exception as error:
        try:
            undo()
        except Exception as second:
            raise HalfExchanged(f"{error}; and undoing it failed: {second}") from error
        raise
