"""The header of the weight bank: which tensors it holds, where they lie, and the words that each side writes.

It begins the segment: layout | the learner's words | the worker's | each slot's | the specs, as JSON (bank_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from aurora_vllm.transport.bank_layout import (
    EVIDENCE_BYTES,
    PAGE,
    SLOTS,
    SPECS_AT,
    TensorSpec,
    decode,
    encode,
    sizes,
)
from aurora_vllm.transport.bank_slot import Slot, SlotWords
from aurora_vllm.transport.block import Block, Bool, Int
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.memory import HostMemory, Memory
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORABK", "little")
FORMAT = 1


class Layout(Block):
    """Written once, when the bank is made."""

    __slots__ = ()

    magic = Int()
    format = Int()
    spec_bytes = Int()
    weights_elsewhere = Bool()


class LearnerWords(Block):
    __slots__ = ()

    published = Int()


class WorkerWords(Block):
    __slots__ = ()

    held = Int()  # live << 32 | previous, so that both change in one store


_LEARNER_AT = Layout.size()
_WORKER_AT = _LEARNER_AT + LearnerWords.size()
_SLOTS_AT = _WORKER_AT + WorkerWords.size()


class BankHeader:
    """The header of the bank in a segment.

    Attributes:
        specs: of the tensors of a version.
        learner, worker: the words of either side.

    Raises:
        ValueError: the segment holds no bank.
    """

    def __init__(self, segment: Segment) -> None:
        layout = Layout(segment.buf) if segment.size >= PAGE else None
        if layout is None or layout.magic != MAGIC or layout.format != FORMAT:
            raise ValueError(f"segment {segment.name} holds no weight bank of format {FORMAT}")
        self._segment = segment
        self._weights_elsewhere = layout.weights_elsewhere
        encoded = bytes(segment.buf[SPECS_AT : SPECS_AT + layout.spec_bytes])
        self.specs = decode(encoded)
        self._size, self._weights = sizes(self.specs, encoded)
        self.learner = LearnerWords(segment.buf[_LEARNER_AT:])
        self.worker = WorkerWords(segment.buf[_WORKER_AT:])

    @staticmethod
    def write(segment: Segment, specs: Sequence[TensorSpec], weights_elsewhere: bool) -> None:
        """Make a fresh segment, which must be large enough, an empty bank."""
        encoded = encode(specs)
        layout = Layout(segment.buf)
        layout.format, layout.spec_bytes, layout.weights_elsewhere = FORMAT, len(encoded), weights_elsewhere
        segment.buf[SPECS_AT : SPECS_AT + len(encoded)] = encoded
        fence()
        layout.magic = MAGIC  # last, so that a process that finds it finds the rest

    def slots(self, memory: Memory | None) -> list[Slot]:
        """The bank's slots.

        Args:
            memory: other memory that holds the weights; None if they lie in the segment.

        Raises:
            ValueError: they lie elsewhere, or the segment or the memory is too small.
        """
        segment, weights = self._segment, self._weights
        if (memory is not None) != self._weights_elsewhere:
            where = "in other memory, which is to be given" if memory is None else "in it, nowhere else"
            raise ValueError(f"segment {segment.name} holds a bank whose weights lie {where}")
        if memory is None:
            memory = HostMemory(segment, self._size)
            stride = evidence_stride = weights + EVIDENCE_BYTES
            evidence_at = self._size + weights
        else:
            stride, evidence_at, evidence_stride = weights, self._size, EVIDENCE_BYTES
        enough = segment.size >= evidence_at + (SLOTS - 1) * evidence_stride + EVIDENCE_BYTES
        if not enough or len(memory.bytes) < (SLOTS - 1) * stride + weights:
            raise ValueError(f"segment {segment.name} is too small for its weight bank")
        slots = []
        for i in range(SLOTS):
            words = SlotWords(segment.buf[_SLOTS_AT + i * SlotWords.size() :])
            evidence = segment.buf[evidence_at + i * evidence_stride :][:EVIDENCE_BYTES]
            slots.append(Slot(words, evidence, memory, i * stride, weights, self.specs))
        return slots
