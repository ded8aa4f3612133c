"""A full memory fence from Python."""

from __future__ import annotations

import threading


class Fence:
    """Orders the calling thread's memory accesses: those before the call happen before those after it.

    The shared objects publish in the order payload, then counter. On x86-64 (total store order) plain stores keep that
    order by themselves, and the counter is one aligned 8-byte store, so a reader that sees it sees the payload. Two
    things are not covered by that: machines with weaker ordering (AArch64, POWER), and a store followed by a load of
    another word, which x86 may swap too. Releasing and re-acquiring a private lock covers both: it is a release store
    followed by an acquire load, and on x86 a LOCK-prefixed instruction. About 0.1 us, never contended, so never a wait.
    Only x86-64 is tested; elsewhere the argument is the architecture manual's.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._acquire, self._release = lock.acquire, lock.release

    def __call__(self) -> None:
        self._release()
        self._acquire()
