"""A directory that appears whole or not at all, whenever the process dies or the power goes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".*.partial"  # what a killed writer leaves behind


@contextmanager
def appears_whole(out: Path, private: bool) -> Iterator[Path]:
    """A new directory beside ``out`` to write into. When the block ends well it is flushed to disk and becomes ``out``.

    Args:
        out: must not exist, or be an empty directory.
        private: for its owner alone (0700, files 0600); else as a program's output usually is (0755, 0644).

    Raises:
        OSError: it cannot be written, or ``out`` is there.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            path.chmod((0o700 if path.is_dir() else 0o600) if private else (0o755 if path.is_dir() else 0o644))
            flush(path)
        staging.rename(out)
        flush(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """One writer at a time, of all processes that ask: whoever comes second waits."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """See a file's content, or a directory's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
