"""Memory for the rows of a ring or the weights of a bank, and the order of two processes' work on it.

Counters, sequence words and evidence always lie in POSIX shared memory. The bytes they refer to may lie beside them, or
on a GPU (:mod:`.cuda`), where work is only enqueued when a call returns. So ring and bank state at three points what
must have happened, and the memory does what that takes.
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
        """Who sees a word that is stored after this call also sees what this process wrote before. Never waits."""

    def take_over(self) -> None:
        """From now on this process reads what was handed over before the word that it has just seen. Never waits."""

    def settle(self) -> None:
        """Returns when all that this process enqueued on it so far is complete. May wait: not for the serving side."""

    def crc32(self, start: int, stop: int, crc: int) -> int:
        """CRC-32 of the bytes start .. stop, continued from `crc`."""


class NamedMemory(Memory, Protocol):
    """Memory of a device that another process can open by its name."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def release(self) -> None:
        """Free the memory and its name; of lent memory, only the name. For its maker, once no tensor over it is
        used."""


class Place(Protocol):
    """Makes, lends and opens such memory. All methods raise, with a line for users, where that is impossible."""

    def create(self, kind: str, size: int, device: torch.device) -> NamedMemory: ...
    def lend(self, kind: str, tensor: torch.Tensor) -> NamedMemory: ...
    def open(self, name: str) -> NamedMemory: ...


def memory_for(device: torch.device) -> Place | None:
    """What makes shared memory on this device; None for POSIX shared memory."""
    return CudaMemory if device.type == "cuda" else None


class HostMemory:
    """A segment from an offset in bytes on. Work is complete when a call returns, so a fence orders it."""

    def __init__(self, segment: Segment, offset: int) -> None:
        self._buf = segment.buf[offset:]
        self.bytes = torch.frombuffer(self._buf, dtype=torch.uint8)

    hand_over = take_over = settle = staticmethod(fence)

    def crc32(self, start: int, stop: int, crc: int) -> int:
        """As :meth:`Memory.crc32`."""
        return zlib.crc32(self._buf[start:stop], crc)
