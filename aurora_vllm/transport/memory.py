"""Where the rows of a ring or the weights of a bank lie, and how two processes' work on them is ordered.

Counters, sequence words and evidence always lie in POSIX shared memory. The bytes they speak of may lie beside them, or
on a GPU (:mod:`.cuda`), where work is only enqueued when a call returns. So a ring and a bank say at three points what
must have happened, and the memory knows what that takes.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import torch

from aurora_vllm.transport.cuda import CudaMemory
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.segment import Segment


class Memory(Protocol):
    """Bytes that two processes share."""

    @property
    def bytes(self) -> torch.Tensor:
        """All of it. uint8 [size]"""

    def hand_over(self) -> None:
        """What this process wrote is there for whoever sees a word that is stored after this call. Never waits."""

    def take_over(self) -> None:
        """What was handed over before a word that was just seen is what is read from now on. Never waits."""

    def settle(self) -> None:
        """All this process has done with it so far is done when this returns. May wait: not for the serving side."""

    def crc32(self, start: int, stop: int, crc: int) -> int:
        """CRC-32 of the bytes start .. stop, going on from `crc`."""


class NamedMemory(Memory, Protocol):
    """Memory of a device that another process opens by its name."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def release(self) -> None:
        """Free it and its name; of what is lent, the name. Only its maker, and only where no tensor over it is used."""


class Place(Protocol):
    """Where such memory is made, lent and opened. All raise, with a line fit to be shown, where it cannot be had."""

    def create(self, kind: str, size: int, device: torch.device) -> NamedMemory: ...
    def lend(self, kind: str, tensor: torch.Tensor) -> NamedMemory: ...
    def open(self, name: str) -> NamedMemory: ...


def memory_for(device: torch.device) -> Place | None:
    """Where the ring and the bank of a target on this device lie; None: in POSIX shared memory."""
    return CudaMemory if device.type == "cuda" else None


class HostMemory:
    """The part of a segment from an offset in bytes on. Work is done when a call returns, so a fence orders it."""

    def __init__(self, segment: Segment, offset: int) -> None:
        self._buf = segment.buf[offset:]
        self.bytes = torch.frombuffer(self._buf, dtype=torch.uint8)

    hand_over = take_over = settle = staticmethod(fence)

    def crc32(self, start: int, stop: int, crc: int) -> int:
        """As :meth:`Memory.crc32`."""
        return zlib.crc32(self._buf[start:stop], crc)
