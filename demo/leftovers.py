"""Removes vLLM's own shared memory that a killed server left behind.

vLLM's processes communicate through ``multiprocessing.shared_memory`` and semaphores. A worker that ends by SIGKILL
leaves them in /dev/shm; vLLM itself sends SIGKILL when an engine does not end in time. Aurora's own segments have their
owner in their name and are swept by ``aurora_vllm.transport.segment``. vLLM's have not, so those that no process maps
are removed. Intel's OpenMP keeps a file of a kilobyte there, named by its process's id; it stays if that process is
killed.
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
    """Files in /dev/shm of the kinds that Python's multiprocessing and Intel's OpenMP create."""
    return {path.name for path in SHM.iterdir() if PATTERN.fullmatch(path.name)}


def remove(before: set[str]) -> list[str]:
    """Remove files that are not in ``before``, are this user's, and are mapped by no process. Returns their names."""
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
    """Whether the process of an OpenMP file lives. These files are mapped only briefly, but name their process."""
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
