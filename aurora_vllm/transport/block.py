"""One process's fields in shared memory, as attributes.

An integer or float is one aligned 8-byte store. A text or a list of floats is wider than that: it has several
copies, written in turn, and a counter that says which one is good, so a reader sees the old value or the new one, and a
writer killed midway leaves the old one. (Two copies would do for a rare writer; beside one that writes without pause a
reader then collides most of the time.)
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aurora_vllm.transport.fence import fence

COPIES = 8  # of a wide field
POSITIONS = 8  # draft positions, the largest K


@dataclass(frozen=True)
class Kind:
    """What a field holds: "int", "bool", "float", "text" (UTF-8 of at most `width` bytes), "floats" (8 of them) or
    "ints" (as many as fit into `width` bytes)."""

    name: str
    width: int = 8


INT, BOOL, FLOAT = Kind("int"), Kind("bool"), Kind("float")
TEXT, STATE = Kind("text", 200), Kind("text", 32)
REQUEST, ANSWER = Kind("text", 4128), Kind("text", 1024)  # a path of 4096 bytes and a number; a sentence
FLOATS = Kind("floats", 8 * POSITIONS)
COUNTS = Kind("ints", 4096)


class Block:
    """The fields of one process, as attributes. Unknown names raise AttributeError."""

    __slots__ = ("_buf", "_fields", "_floats", "_ints")

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
        if kind.name == "text":
            return raw.rstrip(b"\0").decode(errors="replace")
        return memoryview(raw).cast("d" if kind.name == "floats" else "q").tolist()

    def __setattr__(self, name: str, value: Any) -> None:
        kind, at = self._place(name)
        if kind.name == "float":
            self._floats[at // 8] = float(value)
        elif kind.name in ("int", "bool"):
            self._ints[at // 8] = int(value)
        elif kind.name == "text":
            self._write_wide(kind, at, _encode_text(value, kind.width))
        else:
            self._write_wide(kind, at, _encode_floats(value) if kind.name == "floats" else _encode_ints(value, kind))

    def beat(self) -> None:
        """Set heartbeat_ns to now."""
        self.heartbeat_ns = time.monotonic_ns()

    def snapshot(self) -> dict[str, Any]:
        """All fields as plain Python values that JSON can hold: a float that is not finite becomes None."""
        return {name: _finite(getattr(self, name)) for name in self._fields}

    def _place(self, name: str) -> tuple[Kind, int]:
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"the control block has no field {name!r}") from None

    def _read_wide(self, kind: Kind, at: int) -> bytes:
        for _ in range(100):  # only a reader that loses the CPU in the middle looks twice; bounded all the same
            count = self._ints[at // 8]
            fence()
            start = at + 8 + count % COPIES * kind.width
            raw = bytes(self._buf[start : start + kind.width])
            fence()
            if self._ints[at // 8] - count < COPIES - 1:  # the writer has not come round to this copy
                break
        return raw

    def _write_wide(self, kind: Kind, at: int, raw: bytes) -> None:
        count = self._ints[at // 8] + 1
        start = at + 8 + count % COPIES * kind.width
        self._buf[start : start + kind.width] = raw.ljust(kind.width, b"\0")
        fence()
        self._ints[at // 8] = count


def _field_bytes(kind: Kind) -> int:
    return 8 if kind.name in ("int", "bool", "float") else 8 + COPIES * kind.width


def block_bytes(fields: dict[str, Kind]) -> int:
    """Rounded up to whole cache lines, so that no two writers share one."""
    return -(-sum(map(_field_bytes, fields.values())) // 64) * 64


def _encode_text(value: str, width: int) -> bytes:
    """UTF-8 without zero bytes, cut to width between two characters."""
    raw = str(value).replace("\0", "").encode(errors="replace")
    return raw if len(raw) <= width else raw[:width].decode(errors="ignore").encode()


def _encode_floats(values: Any) -> bytes:
    """The first 8 numbers, the rest zero."""
    row = [float(value) for value in values][:POSITIONS]
    return struct.pack(f"={POSITIONS}d", *row, *[0.0] * (POSITIONS - len(row)))


def _encode_ints(values: Sequence[int], kind: Kind) -> bytes:
    """The rest zero. Raises ValueError where they do not fit."""
    if 8 * len(values) > kind.width:
        raise ValueError(f"{len(values)} integers do not fit into {kind.width} bytes")
    return struct.pack(f"={len(values)}q", *values)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
