"""Checkpoints on disk: whole or not there, whatever kills the writer; the newest two; for their owner alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner import checkpoints as module
from aurora_vllm.learner.checkpoints import Checkpoint, Checkpoints, find, newest
from aurora_vllm.learner.draft import load_draft
from tests.unit.checkpoint_children import save_for_ever, state
from tests.unit.transport_children import finish, start


def make(directory: Path, run: str = "run", resumed: Path | None = None) -> Checkpoints:
    return Checkpoints(directory, run, {"command": ["serve"], "target": {"fingerprint": "f"}}, resumed)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def number_of(kept: Path) -> int:
    """The number all of its content agrees on."""
    checkpoint = Checkpoint.read(kept)
    number = int(checkpoint.facts["statistics"]["steps"])
    for tensor in [*load_draft(kept).parameters(), *checkpoint.tensors().values()]:
        assert (tensor == number).all()
    return number


def assert_whole(directory: Path) -> list[int]:
    """Whatever is called a checkpoint is one, and ``latest`` is one of the newest two. Their numbers."""
    found = [path for path in directory.iterdir() if path.name.startswith("checkpoint-")]
    numbers = sorted(number_of(path) for path in found)
    latest = newest(directory)
    assert latest is not None
    assert latest in [path.resolve() for path in sorted(found)[-2:]]  # by name: who comes after a kill counts from 1
    return numbers


def test_the_newest_two_are_kept_and_latest_points_to_the_last(tmp_path: Path) -> None:
    made = make(tmp_path / "deep" / "kept")
    for number in range(1, 5):
        assert number_of(made.save(*state(number))) == number
    assert names(made.directory) == ["checkpoint-000003", "checkpoint-000004", "latest"]
    assert (made.directory / "latest").readlink() == Path("checkpoint-000004")
    assert newest(made.directory) == (made.directory / "checkpoint-000004").resolve()
    facts = Checkpoint.read(made.directory / "latest").facts
    assert facts["provenance"]["command"] == ["serve"]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        out = make(tmp_path / "kept").save(*state(1))
    finally:
        os.umask(old)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    for path in [out, *out.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@settings(max_examples=60)
@given(line=st.integers(1, 130))
def test_killed_before_any_line_of_a_save(tmp_path_factory: pytest.TempPathFactory, line: int) -> None:
    directory = tmp_path_factory.mktemp("kept")
    assert finish(start(save_for_ever, str(directory), line)) == -9
    assert assert_whole(directory)[-1] >= 2
    made = make(directory, "next")
    made.save(*state(99))
    assert assert_whole(directory)[-1] == 99
    assert not list(directory.glob(".*"))
    shutil.rmtree(directory)


def test_every_kind_of_leftover_is_removed(tmp_path: Path) -> None:
    made = make(tmp_path)
    one = made.save(*state(1))
    (tmp_path / ".latest.partial").symlink_to(one.name)
    (tmp_path / ".dangling.partial").symlink_to("gone")
    shutil.copytree(one, tmp_path / ".checkpoint-000001.partial")
    (tmp_path / ".checkpoint-000002.abc.partial").mkdir()
    (tmp_path / ".file.partial").write_text("")
    made.save(*state(2))
    assert assert_whole(tmp_path) == [1, 2]
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002", "latest"]


def test_killed_again_and_again_while_it_saves(tmp_path: Path) -> None:
    """The same directory all the time: what one killed writer leaves, the next has to live with."""
    rng = random.Random(0)
    partial = 0
    for kill in range(15):
        child = start(save_for_ever, str(tmp_path))
        before = newest(tmp_path)
        deadline = time.monotonic() + 30
        while newest(tmp_path) in (before, None) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        partial += any(tmp_path.glob(".*.partial"))
        assert_whole(tmp_path)
        assert len(list(tmp_path.glob("checkpoint-*"))) <= 3 * (kill + 1)  # each child is a lineage of its own
    assert partial > 0, "no save was ever hit: the test shows nothing"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_save_that_fails_leaves_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    made = make(tmp_path)
    made.save(*state(1))

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(type(error)):
        made.save(*state(2))
    assert names(tmp_path) == ["checkpoint-000001", "latest"]
    monkeypatch.undo()
    made.save(*state(3))
    assert assert_whole(tmp_path) == [1, 3]


def test_other_runs_are_left_alone_and_resumed_ones_are_not(tmp_path: Path) -> None:
    first = make(tmp_path, "first")
    for number in (1, 2):
        first.save(*state(number))
    stranger = make(tmp_path, "stranger")  # somebody forgot --aurora-resume
    for number in (3, 4, 5):
        stranger.save(*state(number))
    assert assert_whole(tmp_path) == [1, 2, 4, 5]
    resumed = tmp_path / "checkpoint-000002"
    heir = make(tmp_path, "heir", resumed)
    for number in (6, 7, 8):
        heir.save(*state(number))
    assert assert_whole(tmp_path) == [2, 4, 5, 7, 8]  # what is being served from stays while the run lasts
    make(tmp_path, "later", tmp_path / "checkpoint-000008").save(*state(9))
    assert assert_whole(tmp_path) == [4, 5, 8, 9]


def test_two_that_go_on_from_one_checkpoint_keep_their_own(tmp_path: Path) -> None:
    make(tmp_path, "first").save(*state(1))
    resumed = tmp_path / "checkpoint-000001"
    one, other = make(tmp_path, "one", resumed), make(tmp_path, "other", resumed)
    for number in (2, 4, 6):
        one.save(*state(number))
        other.save(*state(number + 1))
    assert assert_whole(tmp_path) == [1, 4, 5, 6, 7]
    make(tmp_path, "heir", tmp_path / "checkpoint-000006").save(*state(8))
    assert assert_whole(tmp_path) == [5, 6, 7, 8]  # the first one's goes, and what its own line wrote


def test_a_run_finds_its_own(tmp_path: Path) -> None:
    made = make(tmp_path, "mine")
    assert made.newest_of_run() is None
    made.save(*state(1))
    make(tmp_path, "other").save(*state(2))
    again = make(tmp_path, "mine")
    found = again.newest_of_run()
    assert found is not None and found.facts["statistics"]["steps"] == 1
    again.save(*state(3))
    again.save(*state(4))
    assert assert_whole(tmp_path) == [2, 3, 4]  # one lineage with the first


def test_what_resume_means(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert find(Path("latest"), kept) == []  # a first start with the flags of every start
    made = make(kept)
    one, two = made.save(*state(1)), made.save(*state(2))
    assert find(kept, None) == find(kept / "latest", None) == [two.resolve()]
    assert find(one, kept) == [one.resolve()]
    newest_first = [two.resolve(), one.resolve()]  # one may be damaged
    assert find(Path("latest"), kept) == newest_first
    (kept / "latest").unlink()
    assert find(Path("latest"), kept) == newest_first
    (kept / "latest").symlink_to("gone")
    assert find(Path("latest"), kept) == newest_first


@pytest.mark.parametrize(
    ("path", "directory", "line"),
    [
        ("latest", None, "there is no --aurora-checkpoint-dir to look in"),
        ("{tmp}/nowhere", None, "is no directory"),
        ("{tmp}", None, "is no checkpoint; one holds learner/state.json"),
    ],
)
def test_resume_of_nothing_is_one_line(tmp_path: Path, path: str, directory: Path | None, line: str) -> None:
    with pytest.raises(AuroraError) as caught:
        find(Path(path.format(tmp=tmp_path)), directory)
    assert line in str(caught.value)


def test_another_format_and_damage_are_said(tmp_path: Path) -> None:
    kept = make(tmp_path).save(*state(1))
    tensors = kept / "learner" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(AuroraError, match="cannot be read"):
        Checkpoint.read(kept).tensors()
    file = kept / "learner" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(AuroraError, match="has format 99, this version reads 1"):
        Checkpoint.read(kept)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    draft, config, tensors, statistics = state(1)
    torch.manual_seed(0)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter)
    kept = make(tmp_path).save(draft, config | {"torch_dtype": "bfloat16"}, tensors, statistics)
    again = load_draft(kept)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.bfloat16).to(tensor.dtype))
    assert json.loads((kept / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_copy_that_followed_links_is_gone_on_from(tmp_path: Path) -> None:
    """rsync -L, cp -rL, an object store: what ``latest`` pointed to is a directory of that name now, and grows old."""
    before = make(tmp_path / "kept")
    for number in (1, 2):
        before.save(*state(number))
    shutil.copytree(tmp_path / "kept", tmp_path / "copy", symlinks=False)
    assert not (tmp_path / "copy" / "latest").is_symlink()
    after = make(tmp_path / "copy")
    for number in (3, 4, 5):
        after.save(*state(number))
    found = newest(tmp_path / "copy")
    assert found is not None and number_of(found) == 5
    assert names(tmp_path / "copy") == ["checkpoint-000004", "checkpoint-000005", "latest"]


def test_facts_without_what_every_checkpoint_has_are_none(tmp_path: Path) -> None:
    kept = make(tmp_path).save(*state(1))
    file = kept / "learner" / "state.json"
    facts = json.loads(file.read_text())
    del facts["provenance"]
    file.write_text(json.dumps(facts))
    with pytest.raises(AuroraError, match="is damaged, and with it the checkpoint"):
        Checkpoint.read(kept)
