"""One process's fields in shared memory, as attributes.

A block is a class that declares its fields, which lie in memory in that order::

    class WorkerBlock(Block):
        __slots__ = ()
        swaps = Int()
        message = Text()

    block = WorkerBlock(buf)
    block.swaps += 1

An integer or float is one aligned 8-byte store. A text or a list of numbers is wider: it has several copies, written
in turn, and a counter that tells which one is valid. So a reader sees the old value or the new one, and a writer killed
midway leaves the old one. (Two copies would do for a writer that writes seldom; with one that writes without pause, a
reader would collide most of the time.)
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

from aurora_vllm.transport.fence import fence

COPIES = 8  # of a wide field
POSITIONS = 8  # draft positions: the largest K

T = TypeVar("T")


class Block:
    """Use a subclass that declares fields and empty ``__slots__``: unknown names then raise AttributeError."""

    __slots__ = ("buf", "floats", "ints")

    fields: ClassVar[dict[str, BlockField[Any]]] = {}  # in the order of their memory; a base class's come first

    def __init__(self, buf: memoryview) -> None:
        """Over the first :meth:`size` bytes of `buf`, aligned to 8 bytes."""
        buf = buf[: self.size()]
        self.buf, self.ints, self.floats = buf, buf.cast("q"), buf.cast("d")

    def __init_subclass__(cls) -> None:
        at = sum(field.size for field in cls.fields.values())
        own = {name: field for name, field in vars(cls).items() if isinstance(field, BlockField)}
        for field in own.values():
            field.at, at = at, at + field.size
        cls.fields = cls.fields | own

    @classmethod
    def size(cls) -> int:
        """Bytes, in whole cache lines, so that no two writers share one."""
        return -(-sum(field.size for field in cls.fields.values()) // 64) * 64

    def snapshot(self) -> dict[str, Any]:
        """All fields as plain Python values for JSON: a float that is not finite becomes None."""
        return {name: _finite(getattr(self, name)) for name in self.fields}


class BlockField(ABC, Generic[T]):
    """A descriptor: the type of a field, and its place in the block."""

    at: int  # offset in bytes in the block
    width = 8  # bytes of a value

    @property
    def size(self) -> int:
        """Bytes it takes in the block."""
        return self.width

    @overload
    def __get__(self, block: None, owner: type[Block]) -> Self: ...
    @overload
    def __get__(self, block: Block, owner: type[Block]) -> T: ...
    def __get__(self, block: Block | None, owner: type[Block]) -> Self | T:
        return self if block is None else self._load(block)

    @abstractmethod
    def _load(self, block: Block) -> T: ...


class Int(BlockField[int]):
    """int64."""

    def _load(self, block: Block) -> int:
        return block.ints[self.at // 8]

    def __set__(self, block: Block, value: int) -> None:
        block.ints[self.at // 8] = int(value)


class Bool(BlockField[bool]):
    """An int64 that is 0 or 1."""

    def _load(self, block: Block) -> bool:
        return bool(block.ints[self.at // 8])

    def __set__(self, block: Block, value: bool) -> None:
        block.ints[self.at // 8] = int(value)


class Float(BlockField[float]):
    """float64."""

    def _load(self, block: Block) -> float:
        return block.floats[self.at // 8]

    def __set__(self, block: Block, value: float) -> None:
        block.floats[self.at // 8] = float(value)


class Wide(BlockField[T]):
    """A counter and :data:`COPIES` copies of `width` bytes."""

    def __init__(self, width: int) -> None:
        self.width = width

    @property
    def size(self) -> int:
        return 8 + COPIES * self.width

    def _read(self, block: Block) -> bytes:
        for _ in range(100):  # only a reader that loses the CPU meanwhile needs a second try; bounded all the same
            count = block.ints[self.at // 8]
            fence()
            start = self.at + 8 + count % COPIES * self.width
            raw = bytes(block.buf[start : start + self.width])
            fence()
            if block.ints[self.at // 8] - count < COPIES - 1:  # the writer has not reached this copy again
                break
        return raw

    def _write(self, block: Block, raw: bytes) -> None:
        count = block.ints[self.at // 8] + 1
        start = self.at + 8 + count % COPIES * self.width
        block.buf[start : start + self.width] = raw.ljust(self.width, b"\0")
        fence()
        block.ints[self.at // 8] = count


class Text(Wide[str]):
    """UTF-8 of at most `width` bytes: longer texts are cut between two characters."""

    def __init__(self, width: int = 200) -> None:
        super().__init__(width)

    def _load(self, block: Block) -> str:
        return self._read(block).rstrip(b"\0").decode(errors="replace")

    def __set__(self, block: Block, value: str) -> None:
        raw = str(value).replace("\0", "").encode(errors="replace")
        fits = raw if len(raw) <= self.width else raw[: self.width].decode(errors="ignore").encode()
        self._write(block, fits)


class Floats(Wide[list[float]]):
    """A float64 for each draft position: at most :data:`POSITIONS` are stored, and missing ones are zero."""

    def __init__(self) -> None:
        super().__init__(8 * POSITIONS)

    def _load(self, block: Block) -> list[float]:
        return list(struct.unpack(f"={POSITIONS}d", self._read(block)))

    def __set__(self, block: Block, value: Sequence[float]) -> None:
        row = [float(number) for number in value][:POSITIONS]
        self._write(block, struct.pack(f"={len(row)}d", *row))


class Ints(Wide[list[int]]):
    """`count` int64; missing ones are zero."""

    def __init__(self, count: int) -> None:
        super().__init__(8 * count)

    def _load(self, block: Block) -> list[int]:
        return memoryview(self._read(block)).cast("q").tolist()

    def __set__(self, block: Block, value: Sequence[int]) -> None:
        """Raises ValueError where there are too many."""
        if 8 * len(value) > self.width:
            raise ValueError(f"{len(value)} integers do not fit into {self.width} bytes")
        self._write(block, struct.pack(f"={len(value)}q", *value))


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
