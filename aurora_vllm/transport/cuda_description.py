"""The page by which another process finds memory on a GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from aurora_vllm.transport.cuda_driver import HANDLE_BYTES
from aurora_vllm.transport.segment import Segment

_DESCRIPTION = struct.Struct(f"<8sQQ40s{HANDLE_BYTES}s{HANDLE_BYTES}s")
_MAGIC = b"AURORGPU"


@dataclass(frozen=True)
class Description:
    """What another process needs in order to open the memory."""

    size: int  # bytes
    offset: int  # of the first of them in the allocation
    device: str  # UUID: two processes may number their GPUs differently (CUDA_VISIBLE_DEVICES)
    memory_handle: bytes
    event_handle: bytes

    def write(self, segment: Segment) -> None:
        packed = _DESCRIPTION.pack(
            _MAGIC, self.size, self.offset, self.device.encode(), self.memory_handle, self.event_handle
        )
        segment.buf[: len(packed)] = packed

    @classmethod
    def read(cls, segment: Segment) -> Description:
        """Raises ValueError where the segment describes no device memory."""
        if segment.size < _DESCRIPTION.size:
            raise ValueError(f"segment {segment.name} describes no device memory")
        magic, size, offset, device, memory, event = _DESCRIPTION.unpack_from(segment.buf)
        if magic != _MAGIC:
            raise ValueError(f"segment {segment.name} describes no device memory")
        return cls(size, offset, device.rstrip(b"\0").decode(), memory, event)
