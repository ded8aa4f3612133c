"""The weight bank: versions of the draft's weights from the learner to the worker.

Three slots, one more than the worker holds (its live and its previous version), so there is always one to write to.
One writer (learner), one reader (worker). Each slot has a sequence word, odd while the slot is being written, and a
CRC-32 over its tensors, version and evidence. A writer killed midway leaves an odd word: that version reads as torn,
the other slots are as they were.

How the worker takes version `new` while `live` is running, without ever using memory that changes under it::

    publication = bank.read(new)            # TornPublish: stay with live
    ...                                     # look at the tensors
    bank.hold(live=new, previous=live)      # first claim the slot,
    if not publication.still_valid():       # then see whether it is still what was checked
        bank.hold(live, previous)           # the learner was faster: stay with live
    ...                                     # swap; the views in publication.tensors stay good while the version is held

The learner does the mirror image: it marks the slot as being written, then looks whether the worker has claimed it.
Whichever comes second sees the first.

The weights lie in the segment, each slot's before its evidence, or in another :class:`.memory.Memory`. There, too, the
learner's copies are over before it says so, so the worker waits for nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_vllm.transport.bank_layout import (
    ALIGNMENT,
    EVIDENCE_BYTES,
    PAGE,
    SLOTS,
    SPECS_AT,
    TensorSpec,
    aligned,
    bank_bytes,
    decode,
    encode,
    sizes,
    weights_bytes,
)
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.memory import HostMemory, Memory
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORABK", "little")
FORMAT = 1
CRC_CHUNK = 8 << 20  # bytes; large, because the GIL is taken back between two chunks

__all__ = ["Publication", "TensorSpec", "TornPublish", "WeightBank", "bank_bytes", "weights_bytes"]

# Indices of int64 words in the header; slot i has its own cache line at _SLOT + 8 * i.
_MAGIC, _FORMAT, _SPEC_BYTES, _ELSEWHERE, _PUBLISHED, _HELD, _SLOT = 0, 1, 2, 3, 8, 16, 24
_SEQUENCE, _VERSION, _CHECKSUM, _EVIDENCE = 0, 1, 2, 3


class TornPublish(RuntimeError):
    """The version asked for is not, or not wholly, in the bank."""


@dataclass(frozen=True)
class Publication:
    """One version, read and checked. `tensors` are views into the slot: do not write to them."""

    version: int
    tensors: dict[str, torch.Tensor]
    evidence: dict[str, Any]
    _bank: WeightBank
    _slot: int
    _sequence: int

    @property
    def lineage(self) -> int:
        """The version with which this line of weights began, by a lesson or a draft from disk; what lies between two
        versions of one line is gradient steps. 0: the line of the draft that the server started with."""
        return int(self.evidence.get("lineage", 0))

    def still_valid(self) -> bool:
        """Whether the slot has not been written to since the read; what was copied out before this is then whole."""
        fence()
        return bool(self._bank._slot_word(self._slot, _SEQUENCE) == self._sequence)


class WeightBank:
    """Use :meth:`create` or :meth:`attach`."""

    def __init__(self, segment: Segment, memory: Memory | None = None) -> None:
        words = segment.buf[:PAGE].cast("q") if segment.size >= PAGE else None
        if words is None or words[_MAGIC] != MAGIC or words[_FORMAT] != FORMAT:
            raise ValueError(f"segment {segment.name} holds no weight bank of format {FORMAT}")
        encoded = bytes(segment.buf[SPECS_AT : SPECS_AT + words[_SPEC_BYTES]])
        self.specs = decode(encoded)
        if (memory is not None) != bool(words[_ELSEWHERE]):
            where = "in other memory, which is to be given" if memory is None else "in it, nowhere else"
            raise ValueError(f"segment {segment.name} holds a bank whose weights lie {where}")
        header, self._weights_bytes = sizes(self.specs, encoded)
        if memory is None:
            memory = HostMemory(segment, header)
            self._stride, evidence_at = self._weights_bytes + EVIDENCE_BYTES, header + self._weights_bytes
            evidence_stride = self._stride
        else:
            self._stride, evidence_at, evidence_stride = self._weights_bytes, header, EVIDENCE_BYTES
        enough = segment.size >= evidence_at + (SLOTS - 1) * evidence_stride + EVIDENCE_BYTES
        if not enough or len(memory.bytes) < (SLOTS - 1) * self._stride + self._weights_bytes:
            raise ValueError(f"segment {segment.name} is too small for its weight bank")
        self._words, self._memory = words, memory
        self._evidence = [segment.buf[evidence_at + i * evidence_stride :][:EVIDENCE_BYTES] for i in range(SLOTS)]

    @classmethod
    def create(cls, segment: Segment, specs: Sequence[TensorSpec], memory: Memory | None = None) -> WeightBank:
        """Lay out an empty bank in a fresh segment of at least ``bank_bytes(specs)`` bytes.

        Args:
            memory: where the weights lie instead, of ``weights_bytes(specs)``; the segment then needs
                ``bank_bytes(specs, weights_elsewhere=True)``.

        Raises:
            ValueError: the segment or the memory is too small, or a name occurs twice.
        """
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError("a tensor's name occurs twice in the bank's specs")
        wanted = bank_bytes(specs, weights_elsewhere=memory is not None)
        if segment.size < wanted:
            raise ValueError(f"a weight bank of {wanted} bytes does not fit into {segment.size} bytes")
        encoded = encode(specs)
        words = segment.buf[:PAGE].cast("q")
        words[_FORMAT], words[_SPEC_BYTES], words[_ELSEWHERE] = FORMAT, len(encoded), memory is not None
        segment.buf[SPECS_AT : SPECS_AT + len(encoded)] = encoded
        fence()
        words[_MAGIC] = MAGIC  # last: whoever finds it finds the rest
        return cls(segment, memory)

    @classmethod
    def attach(cls, segment: Segment, memory: Memory | None = None) -> WeightBank:
        """Raises ValueError where the segment holds no bank, or one whose weights lie elsewhere."""
        return cls(segment, memory)

    # --- learner ---

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor], evidence: dict[str, Any]) -> None:
        """Copy a version in and make it the published one. Only the learner calls this.

        It never writes to a slot whose version the worker holds. Where the worker holds two, a published version that
        it has not taken yet is the one overwritten.

        Args:
            version: larger than every one there is, see :meth:`newest`.
            tensors: exactly the names of `specs`, each of its shape and dtype, on any device.
            evidence: why this version is better; JSON, at most 16 KiB. "lineage": see :class:`Publication`.

        Raises:
            ValueError: names, a shape, a dtype, the version or the evidence are wrong. Nothing was written.
        """
        encoded = json.dumps(evidence).encode()
        if len(encoded) > EVIDENCE_BYTES:
            raise ValueError(f"evidence of {len(encoded)} bytes, at most {EVIDENCE_BYTES} fit")
        if version <= self.newest():
            raise ValueError(f"version {version} is not newer than {self.newest()}, which the bank holds")
        self._check(tensors)
        slot = self._claim_slot()
        with torch.no_grad():
            for name, view in self._views(slot).items():
                view.copy_(tensors[name])
        self._memory.settle()
        self._evidence[slot][: len(encoded)] = encoded
        self._set_slot_word(slot, _EVIDENCE, len(encoded))
        self._set_slot_word(slot, _CHECKSUM, self._checksum(slot, version, len(encoded)))
        self._set_slot_word(slot, _VERSION, version)
        fence()
        self._set_slot_word(slot, _SEQUENCE, self._slot_word(slot, _SEQUENCE) + 1)  # even again
        fence()
        self._words[_PUBLISHED] = version

    def newest(self) -> int:
        """The highest version a slot is marked with; 0 for none. A writer killed before it said so left it unpublished:
        two slots of one number would be mistaken for each other."""
        return max(self.published(), *(self._slot_word(i, _VERSION) for i in range(SLOTS)))

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        expected = {spec.name for spec in self.specs}
        if missing := sorted(expected - set(tensors)):
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        if extra := sorted(set(tensors) - expected):
            raise ValueError(f"tensors the bank has no place for: {', '.join(extra)}")
        for spec in self.specs:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name}: {tuple(tensor.shape)} {tensor.dtype}, the bank holds {spec.shape} {spec.dtype}"
                )

    def _claim_slot(self) -> int:
        """Mark a slot that is not held as being written: a torn one, else the oldest. Its index."""
        while True:
            held = self.held()  # once: at most two versions, so a slot is left
            free = [i for i in range(SLOTS) if not self._is_held(i, held)]
            slot = min(free, key=lambda i: (self._slot_word(i, _SEQUENCE) % 2 == 0, self._slot_word(i, _VERSION)))
            sequence = self._slot_word(slot, _SEQUENCE)
            writing = sequence + 1 + sequence % 2  # odd, and new even where a dead writer left an odd one
            self._set_slot_word(slot, _SEQUENCE, writing)
            fence()  # store the mark before looking at what is held: see the module's docstring
            if not self._is_held(slot, self.held()):
                return slot
            self._set_slot_word(slot, _SEQUENCE, writing + 1)  # the worker claimed it meanwhile; nothing was written

    def _is_held(self, slot: int, held: tuple[int, int]) -> bool:
        version = self._slot_word(slot, _VERSION)
        return version > 0 and version in held

    # --- worker ---

    def published(self) -> int:
        """The newest version, 0 before the first. One load: may be asked at every step."""
        return int(self._words[_PUBLISHED])

    def hold(self, live: int, previous: int) -> None:
        """Only the worker calls this: the slots of these versions (below 2**31; 0: none) must not be overwritten."""
        self._words[_HELD] = live << 32 | previous  # one store: between two, a version could be held by neither
        fence()

    def held(self) -> tuple[int, int]:
        """The versions the worker holds: (live, previous)."""
        held = int(self._words[_HELD])
        return held >> 32, held & 0xFFFFFFFF

    def read(self, version: int) -> Publication:
        """A version, zero copy, its checksum verified (most of the time goes there; it releases the GIL).

        Raises:
            TornPublish: the version is not in the bank (any more), or changed during the read, or its checksum is off.
        """
        for slot in range(SLOTS):
            sequence = self._slot_word(slot, _SEQUENCE)
            fence()
            if sequence % 2 == 0 and version > 0 and self._slot_word(slot, _VERSION) == version:
                break
        else:
            raise TornPublish(f"version {version} is not in the bank, or its publish was not finished")
        stored, length = self._slot_word(slot, _CHECKSUM), self._slot_word(slot, _EVIDENCE)
        checksum = self._checksum(slot, version, length, sequence)
        encoded = bytes(self._evidence[slot][:length])
        fence()
        if self._slot_word(slot, _SEQUENCE) != sequence:
            raise TornPublish(f"version {version} was overwritten while it was read")
        if checksum != stored:
            raise TornPublish(f"version {version}: checksum {checksum:08x}, published as {stored:08x}")
        return Publication(version, self._views(slot), json.loads(encoded), self, slot, sequence)

    # --- slots ---

    def _slot_word(self, slot: int, word: int) -> int:
        return int(self._words[_SLOT + 8 * slot + word])

    def _set_slot_word(self, slot: int, word: int, value: int) -> None:
        self._words[_SLOT + 8 * slot + word] = value

    def _views(self, slot: int) -> dict[str, torch.Tensor]:
        memory = self._memory.bytes[slot * self._stride :][: self._weights_bytes]
        views, start = {}, 0
        for spec in self.specs:
            views[spec.name] = memory[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
            start += aligned(spec.nbytes, ALIGNMENT)
        return views

    def _checksum(self, slot: int, version: int, evidence_length: int, sequence: int | None = None) -> int:
        """CRC-32 of version, evidence and tensors. With `sequence` it stops once the slot is being overwritten."""
        crc = zlib.crc32(version.to_bytes(8, "little"))
        crc = zlib.crc32(self._evidence[slot][: max(0, evidence_length)], crc)
        first = slot * self._stride
        for start in range(first, first + self._weights_bytes, CRC_CHUNK):
            if sequence is not None and self._slot_word(slot, _SEQUENCE) != sequence:
                break
            crc = self._memory.crc32(start, min(start + CRC_CHUNK, first + self._weights_bytes), crc)
        return crc
