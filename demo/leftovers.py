"""vLLM's own shared memory, where a server had to be killed in the middle of its start.

vLLM's processes talk through ``multiprocessing.shared_memory`` and semaphores. A worker that ends by SIGKILL, which
vLLM itself uses when an engine does not end in time, leaves them in /dev/shm. Aurora's own segments carry their owner
in their name and are swept by ``aurora_vllm.transport.segment``; these do not, so they are told by what nobody maps.
Intel's OpenMP keeps a note of a kilobyte there, under its process's id, which a process that ends at once leaves.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

SHM = Path("/dev/shm")
PATTERN = re.compile(r"(psm_[0-9a-f]{8}|sem\.mp-[a-z0-9_]{8}|__KMP_REGISTERED_LIB_[0-9]+_[0-9]+)")
OPENMP = re.compile(r"__KMP_REGISTERED_LIB_([0-9]+)_")


def names() -> set[str]:
    """What lies there now, of the kinds that Python's multiprocessing and Intel's OpenMP make."""
    return {path.name for path in SHM.iterdir() if PATTERN.fullmatch(path.name)}


def remove(before: set[str]) -> list[str]:
    """Remove what came since ``before``, is ours, and is mapped by no process. Returns the names."""
    ours = {name for name in names() - before if _is_ours(SHM / name) and not _owner_lives(name)}
    removed = sorted(ours - _mapped(ours)) if ours else []
    for name in removed:
        (SHM / name).unlink(missing_ok=True)
    return removed


def _is_ours(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_uid == os.getuid()
    return False


def _owner_lives(name: str) -> bool:
    """OpenMP's notes are mapped only for a moment, but say whose they are."""
    owner = OPENMP.match(name)
    return owner is not None and Path("/proc", owner[1]).exists()


def _mapped(candidates: set[str]) -> set[str]:
    """By inode, not by name: who makes a semaphore maps it under another one, which it then removes (sem_open(3) in
    glibc), and between that and the start of the process that is to open it, minutes may pass."""
    inodes: dict[int, str] = {}
    for name in candidates:
        with suppress(OSError):
            inodes[(SHM / name).stat().st_ino] = name
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            lines = [line.split(maxsplit=5) for line in (process / "maps").read_text().splitlines() if str(SHM) in line]
            found |= {inodes[inode] for inode in (int(fields[4]) for fields in lines) if inode in inodes}
    return found
