"""The trace ring: rows from the worker to the learner. One producer, one consumer, and neither ever waits.

A page of header, then `capacity` rows. ``head`` counts the rows ever published and is written by the producer alone,
``tail`` counts the rows ever consumed and is written by the consumer alone; each is one aligned 8-byte word on a cache
line of its own. A row is published by storing ``head`` after its bytes, and released by storing ``tail`` after they
were copied out, so a process that dies at any point leaves whole rows or none (see :func:`.fence.fence` for the order
of these stores). A restarted side attaches and goes on at its own counter.

The rows are one uint8 tensor: after the header, or in another :class:`.memory.Memory`, which then also orders the work
that is enqueued on them (:mod:`.cuda`).
"""

from __future__ import annotations

import torch

from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.memory import HostMemory, Memory
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORING", "little")
FORMAT = 1
HEADER_BYTES = 4096
ALIGNMENT = 64

# Indices of int64 words in the header.
_MAGIC, _FORMAT, _ROW_BYTES, _CAPACITY, _ELSEWHERE, _HEAD, _TAIL = 0, 1, 2, 3, 4, 8, 16


def ring_bytes(row_bytes: int, capacity: int) -> int:
    """Size of the segment for a ring of `capacity` rows; less HEADER_BYTES, the size of other memory for the rows.

    Raises:
        ValueError: row_bytes is not a positive multiple of 64, or capacity is below 1.
    """
    if row_bytes < 1 or row_bytes % ALIGNMENT or capacity < 1:
        raise ValueError(
            f"a ring needs rows of a multiple of {ALIGNMENT} bytes and at least one: {row_bytes} x {capacity}"
        )
    return HEADER_BYTES + row_bytes * capacity


class _Header:
    """Header words of an existing ring."""

    def __init__(self, segment: Segment) -> None:
        words = segment.buf[:HEADER_BYTES].cast("q") if segment.size >= HEADER_BYTES else None
        if words is None or words[_MAGIC] != MAGIC or words[_FORMAT] != FORMAT:
            raise ValueError(f"segment {segment.name} holds no ring of format {FORMAT}")
        self.row_bytes, self.capacity = words[_ROW_BYTES], words[_CAPACITY]
        self._words = words


class _Ring(_Header):
    """Header words and rows."""

    def __init__(self, segment: Segment, memory: Memory | None) -> None:
        super().__init__(segment)
        if (memory is not None) != bool(self._words[_ELSEWHERE]):
            where = "in other memory, which is to be given" if memory is None else "behind its header, nowhere else"
            raise ValueError(f"segment {segment.name} holds a ring whose rows lie {where}")
        self.memory: Memory = HostMemory(segment, HEADER_BYTES) if memory is None else memory
        size = ring_bytes(self.row_bytes, self.capacity) - HEADER_BYTES
        if len(self.memory.bytes) < size:
            raise ValueError(f"segment {segment.name} is too small for its ring")
        self._rows = self.memory.bytes[:size].view(self.capacity, self.row_bytes)

    def _views(self, start: int, count: int) -> list[torch.Tensor]:
        """Rows start .. start + count (ever-growing numbers) as one view, or two where they wrap."""
        if count == 0:
            return []
        first = start % self.capacity
        if first + count <= self.capacity:
            return [self._rows[first : first + count]]
        return [self._rows[first:], self._rows[: first + count - self.capacity]]


class RingProducer(_Ring):
    """The worker's side."""

    def __init__(self, segment: Segment, memory: Memory | None = None) -> None:
        super().__init__(segment, memory)
        self._head: int = self._words[_HEAD]
        self._reserved = 0
        self._hand_over = self.memory.hand_over

    @classmethod
    def create(cls, segment: Segment, row_bytes: int, capacity: int, memory: Memory | None = None) -> RingProducer:
        """Lay out an empty ring in a fresh segment of at least ``ring_bytes(row_bytes, capacity)`` bytes.

        Args:
            memory: other memory for the rows; the segment then needs HEADER_BYTES.

        Raises:
            ValueError: the segment or the memory is too small, or a size is bad (see :func:`ring_bytes`).
        """
        size = ring_bytes(row_bytes, capacity)
        room = segment.size if memory is None else min(HEADER_BYTES, segment.size) + len(memory.bytes)
        if room < size:
            raise ValueError(f"{capacity} rows of {row_bytes} bytes do not fit into {room} bytes")
        words = segment.buf[:HEADER_BYTES].cast("q")
        words[_FORMAT], words[_ROW_BYTES], words[_CAPACITY] = FORMAT, row_bytes, capacity
        words[_ELSEWHERE] = memory is not None
        words[_HEAD] = words[_TAIL] = 0
        fence()
        words[_MAGIC] = MAGIC  # last, so that a process that finds it finds the rest
        return cls(segment, memory)

    @classmethod
    def attach(cls, segment: Segment, memory: Memory | None = None) -> RingProducer:
        """Go on where the last producer stopped; rows that it had reserved but not committed are lost.

        Raises:
            ValueError: the segment holds no ring, or one whose rows lie elsewhere.
        """
        return cls(segment, memory)

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._rows.device

    @property
    def written(self) -> int:
        """Rows ever published, those of earlier producers included."""
        return self._head

    def free(self) -> int:
        """Rows that can be reserved now. This can only grow until the next commit."""
        return self.capacity - (self._head - self._words[_TAIL])

    def reserve(self, n: int) -> list[torch.Tensor] | None:
        """Room for the next `n` rows, to be filled and then published by :meth:`commit`; never waits.

        A second call before the commit replaces the first, and starts at the same row.

        Returns:
            uint8 views [k, row_bytes] whose k add up to n (one, two where the ring wraps, none for n = 0), or
            None if they do not fit. They contain old data: write every byte that will be read.
        """
        self._reserved = 0
        if n < 0:
            raise ValueError(f"cannot reserve {n} rows")
        if n > self.free():
            return None
        fence()  # the consumer's last read of this room comes before our first write to it
        self._reserved = n
        return self._views(self._head, n)

    def commit(self) -> None:
        """Publish the rows reserved last, all at once; a no-op where none are."""
        if self._reserved:
            self._hand_over()
            head = self._head + self._reserved
            self._words[_HEAD] = head
            self._head, self._reserved = head, 0


class RingConsumer(_Ring):
    """The learner's side."""

    def __init__(self, segment: Segment, memory: Memory | None = None) -> None:
        super().__init__(segment, memory)
        self._tail: int = self._words[_TAIL]

    @classmethod
    def attach(cls, segment: Segment, memory: Memory | None = None) -> RingConsumer:
        """Go on where the last consumer stopped.

        Raises:
            ValueError: the segment holds no ring, or one whose rows lie elsewhere.
        """
        return cls(segment, memory)

    @property
    def taken(self) -> int:
        """Rows ever consumed, those of earlier consumers included."""
        return self._tail

    def available(self) -> int:
        """Rows that can be read now."""
        return int(self._words[_HEAD]) - self._tail

    def read(self, max_rows: int) -> torch.Tensor:
        """Take the oldest rows, at most max_rows, as a private copy on the ring's device: uint8 [n, row_bytes], n >= 0.

        Their room is released once they are copied: a consumer that dies before that leaves them to the next one.
        """
        count = max(0, min(max_rows, self.available()))
        rows = torch.empty((count, self.row_bytes), dtype=torch.uint8, device=self._rows.device)
        if count:
            self.memory.take_over()
            done = 0
            for view in self._views(self._tail, count):
                rows[done : done + len(view)].copy_(view)
                done += len(view)
            self.memory.settle()
            self._tail += count
            self._words[_TAIL] = self._tail
        return rows


class RingGauge:
    """How full a ring is, for processes that neither write nor read it (status route, metrics)."""

    def __init__(self, segment: Segment) -> None:
        header = _Header(segment)
        self.capacity = header.capacity  # rows
        self._words = header._words

    @classmethod
    def attach(cls, segment: Segment) -> RingGauge:
        """Raises ValueError where the segment holds no ring."""
        return cls(segment)

    @property
    def used(self) -> int:
        """Rows published and not yet consumed."""
        tail = self._words[_TAIL]  # read first: in the other order the difference could become negative
        return min(self.capacity, int(self._words[_HEAD]) - tail)

    @property
    def written(self) -> int:
        """Rows ever published."""
        return int(self._words[_HEAD])
