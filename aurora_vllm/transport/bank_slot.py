"""One slot of the weight bank: a version's tensors, its evidence, and words that tell whether both are intact."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

from aurora_vllm.transport.bank_layout import ALIGNMENT, TensorSpec, aligned
from aurora_vllm.transport.block import Block, Int
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.memory import Memory

CRC_CHUNK = 8 << 20  # bytes; large, because the GIL is taken again between two chunks


class SlotWords(Block):
    """Written by the learner; a cache line of the bank's header."""

    __slots__ = ()

    sequence = Int()  # odd while the slot is being written
    version = Int()  # 0: none yet
    checksum = Int()  # CRC-32 of version, evidence and tensors
    evidence_bytes = Int()


class Slot:
    """A slot's words, evidence and tensors.

    Args:
        words: in the header.
        evidence: room for the evidence.
        memory: holds the tensors of all slots.
        start: offset in bytes of this slot's tensors.
        size: bytes of these tensors, with padding.
        specs: their names, shapes, dtypes.
    """

    def __init__(
        self,
        words: SlotWords,
        evidence: memoryview,
        memory: Memory,
        start: int,
        size: int,
        specs: Sequence[TensorSpec],
    ) -> None:
        self.words = words
        self._evidence, self._memory, self._start, self._size, self._specs = evidence, memory, start, size, specs

    @property
    def is_torn(self) -> bool:
        """Whether it is being written, or its writer died while writing it."""
        return self.words.sequence % 2 == 1

    def open(self) -> None:
        """Mark it as being written."""
        sequence = self.words.sequence
        self.words.sequence = sequence + 1 + sequence % 2  # odd, and a new number even if a dead writer left an odd one

    def close(self) -> None:
        """Mark it as complete."""
        self.words.sequence += 1

    def write(self, version: int, tensors: Mapping[str, torch.Tensor], evidence: bytes) -> None:
        """Fill the slot, which must be open. All copies are complete when this returns."""
        with torch.no_grad():
            for name, view in self.views().items():
                view.copy_(tensors[name])
        self._memory.settle()
        self._evidence[: len(evidence)] = evidence
        self.words.evidence_bytes = len(evidence)
        self.words.checksum = self.crc32(version, evidence)
        self.words.version = version
        fence()

    def views(self) -> dict[str, torch.Tensor]:
        """The tensors, in place."""
        memory = self._memory.bytes[self._start :][: self._size]
        views, at = {}, 0
        for spec in self._specs:
            views[spec.name] = memory[at : at + spec.nbytes].view(spec.dtype).view(spec.shape)
            at += aligned(spec.nbytes, ALIGNMENT)
        return views

    def evidence(self) -> bytes:
        """The evidence as it was written, if the slot is complete."""
        return bytes(self._evidence[: max(0, self.words.evidence_bytes)])

    def crc32(self, version: int, evidence: bytes, sequence: int | None = None) -> int:
        """Checksum of version, evidence and the slot's tensors. With `sequence` it stops once the slot is being
        overwritten."""
        crc = zlib.crc32(evidence, zlib.crc32(version.to_bytes(8, "little")))
        stop = self._start + self._size
        for start in range(self._start, stop, CRC_CHUNK):
            if sequence is not None and self.words.sequence != sequence:
                break
            crc = self._memory.crc32(start, min(start + CRC_CHUNK, stop), crc)
        return crc
