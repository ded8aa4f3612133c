"""The control block: what the processes tell each other and the status route.

Four blocks, each written by exactly one process and read by all::

    control.worker.swaps += 1
    control.learner.message = "training"
    control.snapshot()  # plain Python values

An integer or float is one aligned 8-byte store. A text or a list of floats is wider than that: it has two copies and a
counter whose lowest bit says which one is good, so a reader sees the old value or the new one, and a writer killed
midway leaves the old one. Names of all fields are in :data:`BLOCKS`.
"""

from __future__ import annotations

import json
import math
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Any

from aurora_vllm.transport.acceptance import TABLE_BYTES, AcceptanceTable, VersionAcceptance
from aurora_vllm.transport.fence import Fence
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORACT", "little")
HEADER_BYTES = 64
POSITIONS = 8  # draft positions, the largest K


@dataclass(frozen=True)
class Kind:
    """What a field holds: "int", "bool", "float", or "text" of `width` bytes UTF-8, or "floats", `width` bytes of them."""

    name: str
    width: int = 8


INT, BOOL, FLOAT = Kind("int"), Kind("bool"), Kind("float")
TEXT, STATE = Kind("text", 200), Kind("text", 32)
FLOATS = Kind("floats", 8 * POSITIONS)

# Times ending in _ns are time.monotonic_ns(): one clock for all processes of the machine, which nobody sets.
BLOCKS: dict[str, dict[str, Kind]] = {
    "server": {
        "owner_pid": INT,
        "learner_pid": INT,
        "learner_restarts": INT,
        "learner_gave_up": BOOL,
    },
    "worker": {
        "pid": INT,
        "heartbeat_ns": INT,
        "attached": BOOL,
        "message": TEXT,
        "capture_on": BOOL,
        "capture_errors": INT,
        "step": INT,
        "rows_written": INT,
        "requests_seen": INT,
        "requests_captured": INT,
        "requests_dropped": INT,
        "requests_opted_out": INT,
        "live_version": INT,
        "previous_version": INT,
        "swaps": INT,
        "refusals": INT,
        "refusal": TEXT,
        "last_swap_ns": INT,
        "last_swap_stall_us": FLOAT,
    },
    "scheduler": {
        "heartbeat_ns": INT,
        "draft_length": INT,
        "reason": TEXT,
        "steps": INT,
        "generated_tokens": INT,
        "spec_steps": INT,
    },
    "learner": {
        "pid": INT,
        "heartbeat_ns": INT,
        "state": STATE,
        "message": TEXT,
        "step": INT,
        "trajectories": INT,
        "trajectories_discarded": INT,
        "tokens_seen": INT,
        "tokens_trained": INT,
        "replay_bytes": INT,
        "replay_tokens": INT,
        "loss": FLOAT,
        "cpu_seconds": FLOAT,
        "published_version": INT,
        "publishes": INT,
        "shadow_version": INT,
        "shadow_steps": INT,
        "shadow_accepted_per_position": FLOATS,
        "candidate_acceptance_length": FLOAT,
        "incumbent_acceptance_length": FLOAT,
        "vocabulary_coverage": FLOAT,
    },
}


class Block:
    """The fields of one process, as attributes. Unknown names raise AttributeError."""

    __slots__ = ("_buf", "_fence", "_fields", "_floats", "_ints")

    def __init__(self, buf: memoryview, fields: dict[str, Kind]) -> None:
        place, at = {}, 0
        for name, kind in fields.items():
            place[name] = (kind, at)
            at += _field_bytes(kind)
        for slot, value in {
            "_buf": buf,
            "_ints": buf.cast("q"),
            "_floats": buf.cast("d"),
            "_fields": place,
            "_fence": Fence(),
        }.items():
            object.__setattr__(self, slot, value)

    def __getattr__(self, name: str) -> Any:
        kind, at = self._place(name)
        if kind.name == "float":
            return self._floats[at // 8]
        if kind.name == "int":
            return self._ints[at // 8]
        if kind.name == "bool":
            return bool(self._ints[at // 8])
        raw = self._read_wide(kind, at)
        return raw.rstrip(b"\0").decode(errors="ignore") if kind.name == "text" else memoryview(raw).cast("d").tolist()

    def __setattr__(self, name: str, value: Any) -> None:
        kind, at = self._place(name)
        if kind.name == "float":
            self._floats[at // 8] = float(value)
        elif kind.name in ("int", "bool"):
            self._ints[at // 8] = int(value)
        else:
            self._write_wide(
                kind, at, _encode_text(value, kind.width) if kind.name == "text" else _encode_floats(value)
            )

    def beat(self) -> None:
        """Set heartbeat_ns to now."""
        self.heartbeat_ns = time.monotonic_ns()

    def heartbeat_age(self) -> float | None:
        """Seconds since the last heartbeat, None before the first."""
        beat = self.heartbeat_ns
        return (time.monotonic_ns() - beat) / 1e9 if beat else None

    def snapshot(self) -> dict[str, Any]:
        """All fields as plain Python values that JSON can hold: a float that is not finite becomes None."""
        return {name: _finite(getattr(self, name)) for name in self._fields}

    def _place(self, name: str) -> tuple[Kind, int]:
        try:
            return self._fields[name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"the control block has no field {name!r}") from None

    def _read_wide(self, kind: Kind, at: int) -> bytes:
        for _ in range(100):  # a writer cannot flip twice within each of 100 short copies; bounded all the same
            count = self._ints[at // 8]
            self._fence()
            start = at + 8 + (count & 1) * kind.width
            raw = bytes(self._buf[start : start + kind.width])
            self._fence()
            if self._ints[at // 8] == count:
                break
        return raw

    def _write_wide(self, kind: Kind, at: int, raw: bytes) -> None:
        count = self._ints[at // 8] + 1
        start = at + 8 + (count & 1) * kind.width
        self._buf[start : start + kind.width] = raw.ljust(kind.width, b"\0")
        self._fence()
        self._ints[at // 8] = count


class SchedulerBlock(Block):
    """The scheduler's block: its fields, and what was accepted of each draft version."""

    __slots__ = ("_table",)

    def __init__(self, buf: memoryview, fields: dict[str, Kind], table: memoryview) -> None:
        super().__init__(buf, fields)
        object.__setattr__(self, "_table", AcceptanceTable(table))

    def record(
        self, version: int, num_drafts: int, draft_tokens: int, accepted: int, accepted_per_position: list[int]
    ) -> None:
        """Add to the counts of a version; see :meth:`AcceptanceTable.record`."""
        self._table.record(version, num_drafts, draft_tokens, accepted, accepted_per_position)

    def acceptance(self) -> list[VersionAcceptance]:
        """Counts of the last 64 versions, in ascending order of version."""
        return self._table.rows()  # type: ignore[no-any-return]

    def snapshot(self) -> dict[str, Any]:
        return super().snapshot() | {"acceptance": [row.as_dict() for row in self.acceptance()]}


class ControlBlock:
    """Use :meth:`create` or :meth:`attach`."""

    server: Block
    worker: Block
    scheduler: SchedulerBlock
    learner: Block

    def __init__(self, segment: Segment) -> None:
        words = segment.buf[:HEADER_BYTES].cast("q") if segment.size >= control_bytes() else None
        if words is None or words[0] != MAGIC or words[1] != _fingerprint():
            raise ValueError(f"segment {segment.name} holds no control block of this version")
        at = HEADER_BYTES
        for name, fields in BLOCKS.items():
            size = _block_bytes(fields)
            if name == "scheduler":
                table = segment.buf[at + size : at + size + TABLE_BYTES]
                self.scheduler = SchedulerBlock(segment.buf[at : at + size], fields, table)
                size += TABLE_BYTES
            else:
                setattr(self, name, Block(segment.buf[at : at + size], fields))
            at += size

    @classmethod
    def create(cls, segment: Segment) -> ControlBlock:
        """Lay out a zeroed control block in a fresh segment of at least :func:`control_bytes` bytes.

        Raises:
            ValueError: the segment is too small.
        """
        if segment.size < control_bytes():
            raise ValueError(f"a control block of {control_bytes()} bytes does not fit into {segment.size} bytes")
        words = segment.buf[:HEADER_BYTES].cast("q")
        words[1] = _fingerprint()
        Fence()()
        words[0] = MAGIC
        return cls(segment)

    @classmethod
    def attach(cls, segment: Segment) -> ControlBlock:
        """Raises ValueError where the segment holds no control block with these fields."""
        return cls(segment)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Every block's fields, for the status route; the scheduler's with its acceptance table."""
        return {name: getattr(self, name).snapshot() for name in BLOCKS}


def control_bytes() -> int:
    """Size of the segment that holds a control block."""
    return HEADER_BYTES + sum(map(_block_bytes, BLOCKS.values())) + TABLE_BYTES


def _field_bytes(kind: Kind) -> int:
    return 8 if kind.name in ("int", "bool", "float") else 8 + 2 * kind.width


def _block_bytes(fields: dict[str, Kind]) -> int:
    """Rounded up to whole cache lines, so that no two writers share one."""
    return -(-sum(map(_field_bytes, fields.values())) // 64) * 64


def _fingerprint() -> int:
    layout = {
        block: {name: (kind.name, kind.width) for name, kind in fields.items()} for block, fields in BLOCKS.items()
    }
    return zlib.crc32(json.dumps([layout, TABLE_BYTES]).encode())


def _encode_text(value: str, width: int) -> bytes:
    """UTF-8 without zero bytes, cut to width between two characters."""
    raw = str(value).replace("\0", "").encode(errors="replace")
    return raw if len(raw) <= width else raw[:width].decode(errors="ignore").encode()


def _encode_floats(values: Any) -> bytes:
    """The first 8 numbers, the rest zero."""
    row = [float(value) for value in values][:POSITIONS]
    return struct.pack(f"={POSITIONS}d", *row, *[0.0] * (POSITIONS - len(row)))


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
