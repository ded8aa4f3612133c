"""Exchanges of a running draft's weights with staged ones: plain tensors, fused on a GPU, packed on a CPU.

Called between two steps: the staged weights become live, and the live ones are kept for a rollback. All memory is
allocated while staging, so an exchange is not expected to fail; if it does, it is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class HalfExchanged(RuntimeError):
    """An exchange failed and could not be undone: the live weights are a mixture of two versions."""


class Exchange(Protocol):
    """Exchanges live and staged contents; a second call undoes the first.

    If a call raises, the live weights are as before, except after :class:`HalfExchanged`.
    """

    def __call__(self) -> None: ...


@dataclass
class StagedWeights:
    """A version that is ready to go live, or the one that was live before."""

    version: int
    exchanges: Sequence[Exchange]

    @torch.inference_mode()
    def exchange(self) -> None:
        """Exchange all weights, or none.

        Raises:
            HalfExchanged: some were exchanged and others not.
            Exception: none were; the staged weights may be damaged, so do not exchange them again.
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
    kept: torch.Tensor  # scratch memory of that size; may be shared, since exchanges run one after the other

    def __call__(self) -> None:
        _trade(self.live, self.staged, self.kept)


@dataclass
class Standing:
    """Tensors outside the model that hold a copy of the live weights; shared by a draft's exchanges of one dtype."""

    tensors: list[torch.Tensor]


@dataclass
class AcceleratorExchange:
    """Exchanges all parameters of one dtype on an accelerator by one fused copy on the current stream.

    The outgoing weights need no copy, because the standing tensors, from which they once came, still hold them. So a
    swap reads and writes every byte once and needs no further memory, which a serving GPU may not have. Neither
    `staged` nor the standing tensors may be changed meanwhile.
    """

    live: list[torch.Tensor]
    staged: list[torch.Tensor]  # of the same shapes and dtypes, on the same device
    standing: Standing

    @torch.inference_mode()
    def __call__(self) -> None:
        # After most CUDA errors nothing works any more, so undoing fails, too.
        with _undone_by(lambda: torch._foreach_copy_(self.live, self.standing.tensors, non_blocking=True)):
            torch._foreach_copy_(self.live, self.staged, non_blocking=True)
            for tensor in self.staged:
                if tensor.is_cuda:  # made on another stream: its memory must not be reused before this copy is done
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.staged, self.standing.tensors = self.standing.tensors, self.staged


class HandlerExchange:
    """Exchanges the weights of a vLLM CPU linear layer. It multiplies through a oneDNN handler that holds repacked
    weights, and its own weight is empty. The handler's address is in a one-element tensor that compiled code reads at
    every call (vllm._custom_ops.CPUDNNLGEMMHandler), so exchanging the addresses exchanges the weights.

    Args:
        live: the handler in use.
        staged: owns the weights that are not live; its destructor frees them.
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
    """A context in which an error calls ``undo`` before it propagates.

    Raises:
        HalfExchanged: ``undo`` failed, too.
    """
    try:
        yield
    except Exception as error:
        try:
            undo()
        except Exception as second:
            raise HalfExchanged(f"{error}; and undoing it failed: {second}") from error
        raise
