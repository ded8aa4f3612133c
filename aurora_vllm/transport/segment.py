"""Segment: POSIX shared memory, made by one process and mapped by others.

A file in ``/dev/shm``, not :mod:`multiprocessing.shared_memory`: that module's resource tracker unlinks a segment when
*any* process that attached it ends, so a learner that crashes would take the server's memory with it.

The name says who made the segment: ``aurora-<pid>-<start time of that pid>-<random>-<kind>``. A server that was killed
cannot remove its segments, so the next one calls :func:`sweep`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from aurora_vllm.proc_stat import process_start_time

SHM = Path("/dev/shm")
_NAME = re.compile(r"aurora-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{16}-[a-z0-9_]+")


class NoSharedMemory(RuntimeError):
    """There is no room, or no permission, to make a segment. The message is one line for users."""


class Segment:
    """Shared memory of a fixed size, mode 0600, zeroed when made. Use :meth:`create` or :meth:`attach`.

    As a context manager it closes and, if this object created it, unlinks.
    """

    def __init__(self, name: str, mapping: mmap.mmap, created: bool) -> None:
        self.name = name
        self.size = len(mapping)
        self._created = created
        self._buf: memoryview | None = memoryview(mapping)

    @classmethod
    def create(cls, kind: str, size: int) -> Segment:
        """Make and map a segment of `size` bytes; `kind` ([a-z0-9_]) ends its name.

        Every page is allocated now, so that no later store can fail (if a tmpfs is full, a store raises SIGBUS).

        Raises:
            NoSharedMemory: it does not fit, or /dev/shm is missing or not writable.
            ValueError: size below 1 or a kind with other characters.
        """
        name = f"{own_prefix()}{secrets.token_hex(8)}-{kind}"
        if size < 1 or _NAME.fullmatch(name) is None:
            raise ValueError(f"cannot make a segment of kind {kind!r} and {size} bytes")
        path = SHM / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoSharedMemory(f"cannot create shared memory in {SHM}: {error.strerror}") from error
        try:
            os.fchmod(fd, 0o600)  # whatever the umask
            # The mapping keeps a duplicate of fd, so this lock lasts as long as the mapping or the process. sweep()
            # tests it, too, because the pid of an owner in another pid namespace looks dead.
            fcntl.flock(fd, fcntl.LOCK_SH)
            _allocate(fd, kind, size)
            return cls(name, mmap.mmap(fd, size), created=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Map a segment another process made.

        Raises:
            FileNotFoundError: no such segment.
            PermissionError: it belongs to another user.
            ValueError: not a segment's name.
        """
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"not the name of a segment: {name!r}")
        fd = os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise PermissionError(f"shared memory {name} belongs to another user")
            return cls(name, mmap.mmap(fd, status.st_size), created=False)
        finally:
            os.close(fd)

    @property
    def buf(self) -> memoryview:
        """The memory, writable, uint8 [size]. Tensors and arrays made from it keep the mapping alive."""
        if self._buf is None:
            raise ValueError(f"segment {self.name} is closed")
        return self._buf

    def give_back(self, start: int) -> None:
        """Return the memory from an offset on to the system, if it supports that; its content is lost.

        For memory that is no longer needed: a later store takes new pages, and may find none (SIGBUS).
        """
        mapping = self.buf.obj
        assert isinstance(mapping, mmap.mmap)
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self.size:
            with suppress(OSError):  # gVisor has no MADV_REMOVE: there the memory stays taken
                mapping.madvise(mmap.MADV_REMOVE, start, self.size - start)

    def close(self) -> None:
        """Release the memory. Idempotent.

        It is unmapped when the last view of it (tensor, array, memoryview) is gone, and not before: using a tensor over
        unmapped memory would crash the process.
        """
        self._buf = None

    def unlink(self) -> None:
        """Remove the name. Idempotent. Processes that have it mapped keep the memory."""
        (SHM / self.name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._created:
            self.unlink()


def own_prefix() -> str:
    """The prefix of the names of this process's segments. The pid alone would not do: two containers may share one
    /dev/shm and have the same pids."""
    pid = os.getpid()
    return f"aurora-{pid}-{process_start_time(pid)}-"


def free_bytes() -> int | None:
    """Room for segments; None where there is no /dev/shm."""
    try:
        room = os.statvfs(SHM)
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


def sweep() -> list[str]:
    """Unlink this user's segments whose owner is dead. Returns their names.

    Dead means that no process has the owner's pid, or it started at another time (the pid was reused), or it is a
    zombie; and that nobody holds the owner's lock.
    """
    removed = []
    for path in sorted(SHM.glob("aurora-*")) if SHM.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match is None or process_start_time(int(match["pid"])) == int(match["start"]):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                continue
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path.name)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return removed


def owner_pid(name: str) -> int:
    """Pid of the process that made this segment, dead or alive. Raises ValueError if it is not a segment's name."""
    return _owner(name)[0]


def owner_is_alive(name: str) -> bool:
    """Whether the process that made this segment still runs. Raises ValueError if it is not a segment's name."""
    pid, start = _owner(name)
    return process_start_time(pid) == start


def _owner(name: str) -> tuple[int, int]:
    """Pid and start time of the process that made this segment."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not the name of a segment: {name!r}")
    return int(match["pid"]), int(match["start"])


def _allocate(fd: int, kind: str, size: int) -> None:
    free = free_bytes() or 0
    reason = "not enough room"
    if size <= free:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            reason = error.strerror or reason
    raise NoSharedMemory(
        f"cannot make shared memory for the {kind}: wanted {_mib(size)}, free in {SHM} {_mib(free)} ({reason}); "
        f"give it more room (docker run --shm-size, or mount -o remount,size=… {SHM}) or ask for less"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
