"""Directories that appear complete or not at all, even if the process dies or the power fails."""

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
    """A new directory beside ``out`` to write into. If the block succeeds, it is flushed to disk and renamed to
    ``out``.

    Args:
        out: must not exist, or must be an empty directory.
        private: only for its owner (0700, files 0600); else readable by all (0755, 0644).

    Raises:
        OSError: it cannot be written, or ``out`` exists.
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
    """A lock on a directory between processes; waits until it is free."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
