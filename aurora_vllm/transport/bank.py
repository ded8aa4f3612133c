"""The weight bank: versions of the draft's weights from the learner to the worker.

Three slots, one more than the worker holds (its live and its previous version), so there is always one to write to.
One writer (learner), one reader (worker). Each slot has a sequence word, odd while the slot is being written, and a
CRC-32 over its tensors, version and evidence. A writer killed midway leaves an odd word: that version reads as torn,
the other slots are as they were.

How the worker takes version `new` while `live` is running, without ever using memory that changes under it::

    publication = bank.read(new)            # TornPublish: stay with live
    ...                                     # check the tensors
    bank.hold(live=new, previous=live)      # first claim the slot,
    if not publication.still_valid():       # then see whether it is still what was checked
        bank.hold(live, previous)           # the learner was faster: stay with live
    ...                                     # swap; the views in publication.tensors stay good while the version is held

The learner does the mirror image: it marks the slot as being written, then looks whether the worker has claimed it.
Whichever comes second sees the first.

The weights lie in the segment, each slot's before its evidence, or in another :class:`.memory.Memory`. There, too, the
learner's copies are complete before it publishes, so the worker waits for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aurora_vllm.transport.bank_header import BankHeader
from aurora_vllm.transport.bank_layout import EVIDENCE_BYTES, TensorSpec, bank_bytes, check_tensors, weights_bytes
from aurora_vllm.transport.bank_slot import Slot
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.memory import Memory
from aurora_vllm.transport.segment import Segment

__all__ = ["Publication", "TensorSpec", "TornPublish", "WeightBank", "bank_bytes", "weights_bytes"]


class TornPublish(RuntimeError):
    """The version asked for is not in the bank, or not completely."""


@dataclass(frozen=True)
class Publication:
    """One version, read and checked. `tensors` are views into the slot: do not write to them."""

    version: int
    tensors: dict[str, torch.Tensor]
    evidence: dict[str, Any]
    _slot: Slot
    _sequence: int

    @property
    def lineage(self) -> int:
        """The version with which this line of weights began, by a lesson or a draft from disk; versions of one line
        differ by gradient steps only. 0: the line of the draft that the server started with."""
        return int(self.evidence.get("lineage", 0))

    def still_valid(self) -> bool:
        """Whether the slot has not been written to since the read; if so, what was copied out until now is intact."""
        fence()
        return self._slot.words.sequence == self._sequence


class WeightBank:
    """Use :meth:`create` or :meth:`attach`."""

    def __init__(self, segment: Segment, memory: Memory | None = None) -> None:
        header = BankHeader(segment)
        self.specs = header.specs
        self._learner, self._worker, self._slots = header.learner, header.worker, header.slots(memory)

    @classmethod
    def create(cls, segment: Segment, specs: Sequence[TensorSpec], memory: Memory | None = None) -> WeightBank:
        """Lay out an empty bank in a fresh segment of at least ``bank_bytes(specs)`` bytes.

        Args:
            memory: other memory for the weights, of ``weights_bytes(specs)``; the segment then needs
                ``bank_bytes(specs, weights_elsewhere=True)``.

        Raises:
            ValueError: the segment or the memory is too small, or a name occurs twice.
        """
        if len({spec.name for spec in specs}) != len(specs):
            raise ValueError("a tensor's name occurs twice in the bank's specs")
        wanted = bank_bytes(specs, weights_elsewhere=memory is not None)
        if segment.size < wanted:
            raise ValueError(f"a weight bank of {wanted} bytes does not fit into {segment.size} bytes")
        BankHeader.write(segment, specs, weights_elsewhere=memory is not None)
        return cls(segment, memory)

    @classmethod
    def attach(cls, segment: Segment, memory: Memory | None = None) -> WeightBank:
        """Raises ValueError where the segment holds no bank, or one whose weights lie elsewhere."""
        return cls(segment, memory)

    # --- learner ---

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor], evidence: dict[str, Any]) -> None:
        """Copy a version in and make it the published one. Only the learner calls this.

        It never writes to a slot whose version the worker holds. Where the worker holds two, it overwrites a published
        version that the worker has not taken yet.

        Args:
            version: larger than :meth:`newest`.
            tensors: exactly the names of `specs`, each of its shape and dtype, on any device.
            evidence: why this version is better; JSON, at most 16 KiB. "lineage": see :class:`Publication`.

        Raises:
            ValueError: a name, shape or dtype, the version or the evidence is wrong. Nothing was written.
        """
        encoded = json.dumps(evidence).encode()
        if len(encoded) > EVIDENCE_BYTES:
            raise ValueError(f"evidence of {len(encoded)} bytes, at most {EVIDENCE_BYTES} fit")
        if version <= self.newest():
            raise ValueError(f"version {version} is not newer than {self.newest()}, which the bank holds")
        check_tensors(tensors, self.specs)
        slot = self._claim_slot()
        slot.write(version, tensors, encoded)
        slot.close()
        fence()
        self._learner.published = version

    def newest(self) -> int:
        """The highest version in any slot, 0 for none; also one that a killed writer did not get to publish, because
        two slots with one number would be mistaken for each other."""
        return max(self.published(), *(slot.words.version for slot in self._slots))

    def _claim_slot(self) -> Slot:
        """Mark a slot that is not held as being written: a torn one, else the oldest."""
        while True:
            held = self.held()  # read once: at most two versions, so one slot is free
            free = [slot for slot in self._slots if not _is_held(slot, held)]
            slot = min(free, key=lambda slot: (not slot.is_torn, slot.words.version))
            slot.open()
            fence()  # store the mark before looking at what is held: see the module's docstring
            if not _is_held(slot, self.held()):
                return slot
            slot.close()  # the worker claimed it meanwhile; nothing was written

    # --- worker ---

    def published(self) -> int:
        """The newest published version, 0 before the first. A single load: cheap enough for every step."""
        return self._learner.published

    def hold(self, live: int, previous: int) -> None:
        """Protect these versions' slots (below 2**31; 0: none) from being overwritten. Only the worker calls this."""
        self._worker.held = live << 32 | previous
        fence()

    def held(self) -> tuple[int, int]:
        """The versions the worker holds: (live, previous)."""
        held = self._worker.held
        return held >> 32, held & 0xFFFFFFFF

    def read(self, version: int) -> Publication:
        """Read a version without copying it, and verify its checksum (which takes most of the time, without the GIL).

        Raises:
            TornPublish: the version is not in the bank (any more), changed during the read, or has a wrong checksum.
        """
        for slot in self._slots:
            sequence = slot.words.sequence
            fence()
            if sequence % 2 == 0 and version > 0 and slot.words.version == version:
                break
        else:
            raise TornPublish(f"version {version} is not in the bank, or its publish was not finished")
        stored, encoded = slot.words.checksum, slot.evidence()
        checksum = slot.crc32(version, encoded, sequence)
        fence()
        if slot.words.sequence != sequence:
            raise TornPublish(f"version {version} was overwritten while it was read")
        if checksum != stored:
            raise TornPublish(f"version {version}: checksum {checksum:08x}, published as {stored:08x}")
        return Publication(version, slot.views(), json.loads(encoded), slot, sequence)


def _is_held(slot: Slot, held: tuple[int, int]) -> bool:
    return slot.words.version > 0 and slot.words.version in held
