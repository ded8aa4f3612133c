"""Segments: private, random names, room checked, swept when their owner is dead and only then."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aurora_vllm.proc_stat import process_start_time
from aurora_vllm.transport import segment as module
from aurora_vllm.transport.segment import NoSharedMemory, Segment, sweep
from tests.unit import transport_children as children


@pytest.fixture
def segment() -> Iterator[Segment]:
    with Segment.create("test", 8192) as made:
        yield made


def names() -> set[str]:
    return {path.name for path in module.SHM.glob("aurora-*")}


def test_what_one_side_writes_the_other_reads(segment: Segment) -> None:
    other = Segment.attach(segment.name)
    assert other.size == segment.size == 8192
    assert bytes(segment.buf) == bytes(8192)
    segment.buf[17] = 42
    assert other.buf[17] == 42


def test_mode_is_0600_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        with Segment.create("test", 64) as segment:
            assert stat.S_IMODE((module.SHM / segment.name).stat().st_mode) == 0o600
        os.umask(0o777)
        with Segment.create("test", 64) as segment:
            assert stat.S_IMODE((module.SHM / segment.name).stat().st_mode) == 0o600
            Segment.attach(segment.name)
    finally:
        os.umask(before)


def test_names_are_random_and_say_who_made_them(segment: Segment) -> None:
    with Segment.create("test", 64) as second:
        assert second.name != segment.name
    start = process_start_time(os.getpid())
    assert re.fullmatch(rf"aurora-{os.getpid()}-{start}-[0-9a-f]{{16}}-test", segment.name)


def test_unlink_and_close_may_be_repeated_and_views_stay_good(segment: Segment) -> None:
    other = Segment.attach(segment.name)
    tensor = torch.frombuffer(segment.buf, dtype=torch.uint8)
    segment.unlink()
    segment.unlink()
    other.unlink()
    assert segment.name not in names()
    segment.close()
    segment.close()
    tensor.fill_(7)  # a crash of the whole process where close() had unmapped it
    assert other.buf[100] == 7
    with pytest.raises(ValueError, match="closed"):
        _ = segment.buf


@pytest.mark.parametrize(
    "name", ["", "aurora-1", "../aurora-1-1-0123456789abcdef-x", "aurora-1-1-0123456789abcdef-x/y"]
)
def test_attach_refuses_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="name of a segment"):
        Segment.attach(name)


def test_attach_refuses_missing_ones_and_links(segment: Segment, tmp_path: Path) -> None:
    gone = f"aurora-{os.getpid()}-1-0123456789abcdef-x"
    with pytest.raises(FileNotFoundError):
        Segment.attach(gone)
    link = module.SHM / gone
    link.symlink_to(module.SHM / segment.name)
    try:
        with pytest.raises(OSError, match="symbolic link") as caught:
            Segment.attach(gone)
        assert caught.value.errno == errno.ELOOP
    finally:
        link.unlink()


@pytest.mark.parametrize(("kind", "size"), [("test", 0), ("Bad", 64), ("a/b", 64), ("", 64)])
def test_create_refuses_bad_arguments(kind: str, size: int) -> None:
    with pytest.raises(ValueError, match="cannot make a segment"):
        Segment.create(kind, size)


def test_no_room_is_one_clear_line_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = names()
    with pytest.raises(NoSharedMemory) as caught:
        Segment.create("ring", 1 << 50)
    message = str(caught.value)
    assert "\n" not in message
    assert "the ring" in message
    assert "wanted 1073741824.0 MiB" in message
    assert re.search(r"free in /dev/shm \d+\.\d MiB", message)
    assert "--shm-size" in message

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)  # somebody took the room after we looked
    with pytest.raises(NoSharedMemory, match="No space left"):
        Segment.create("ring", 64)
    assert names() == before


def test_no_shm_file_system_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SHM", tmp_path / "none")
    with pytest.raises(NoSharedMemory, match="No such file"):
        Segment.create("ring", 64)
    assert sweep() == []


def test_what_is_given_back_leaves_the_rest_as_it_was(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    segment.buf[0] = segment.buf[4096] = 7
    with monkeypatch.context() as gvisor:
        gvisor.setattr(module.mmap, "MADV_REMOVE", -1)  # a system that does not know it
        segment.give_back(1)
    assert (segment.buf[0], segment.buf[4096]) == (7, 7)
    segment.give_back(1)
    assert (segment.buf[0], segment.buf[4096]) == (7, 0)
    segment.give_back(8192)


def test_sweep_takes_the_segments_of_a_killed_owner_only(segment: Segment) -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    owner = children.start(children.make_segment_and_wait, send)
    name = receive.recv()
    assert name not in sweep()
    owner.kill()
    owner.join()
    removed = sweep()
    assert name in removed
    assert segment.name not in removed
    assert name not in names()
    assert segment.name in names()
    assert name not in sweep()


def by_hand(pid: int, start: int) -> Path:
    path = module.SHM / f"aurora-{pid}-{start}-0123456789abcdef-test"
    path.write_bytes(b"x")
    return path


def test_sweep_sees_that_a_pid_was_reused() -> None:
    start = process_start_time(os.getpid())
    assert start is not None
    old, mine = by_hand(os.getpid(), start - 1), by_hand(os.getpid(), start)
    try:
        removed = sweep()
        assert old.name in removed
        assert mine.name not in removed
        assert mine.exists()
    finally:
        old.unlink(missing_ok=True)
        mine.unlink()


def test_sweep_keeps_a_locked_one_whose_owner_lives_in_another_pid_namespace() -> None:
    path = by_hand(os.getpid(), 1)
    try:
        with path.open("rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_SH)
            assert path.name not in sweep()
        assert path.name in sweep()
    finally:
        path.unlink(missing_ok=True)


def test_the_owner_holds_that_lock_as_long_as_it_has_the_segment_mapped(segment: Segment) -> None:
    with (module.SHM / segment.name).open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_sweep_leaves_what_is_not_ours() -> None:
    path = module.SHM / "aurora-notes.txt"
    path.write_text("x")
    try:
        assert path.name not in sweep()
        assert path.exists()
    finally:
        path.unlink()


def test_a_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, nobody has reaped it
        assert process_start_time(pid) is None
    finally:
        os.waitpid(pid, 0)


def test_start_time_survives_a_strange_command_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ["S", *map(str, range(4, 53))]
    monkeypatch.setattr(Path, "read_text", lambda self, errors: f"7 (a) b (c) {' '.join(fields)}")
    assert process_start_time(7) == 22
