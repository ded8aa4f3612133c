"""What the front door makes of --aurora-resume and --aurora-checkpoint-dir, and what a checkpoint says of itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from aurora_vllm import models, resuming
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.checkpoints import Checkpoints
from aurora_vllm.learner.target import weights_fingerprint
from aurora_vllm.provenance import provenance, without_secrets
from aurora_vllm.session import Session
from tests.unit.tiny_world import DRAFT, LAYERS, H, V, World


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("owner/tiny", World().save_target(tmp_path / "target"), H, LAYERS, V, "float32")


@pytest.fixture
def kept(tmp_path: Path, target: Target) -> Path:
    facts = {"target": {"model": "owner/tiny", "fingerprint": weights_fingerprint(target.directory)}}
    return Checkpoints(tmp_path / "kept", "run", facts).save(World().draft(), DRAFT, {}, {"steps": 1})


def test_the_checkpoint_is_the_draft(tmp_path: Path, target: Target, kept: Path) -> None:
    for resume in ("latest", str(kept), str(tmp_path / "kept")):
        config = AuroraConfig(resume=resume, checkpoint_dir=tmp_path / "kept", draft="/an/older/one")
        draft = models.resolve_draft(config, target)
        assert (draft.origin, draft.directory, draft.vocab_size) == ("resumed", kept.resolve(), 30)
        assert models.make_draft(draft, target, config) is draft


def test_a_first_start_with_the_flags_of_every_start(
    tmp_path: Path, target: Target, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = object()
    monkeypatch.setattr(models.checkpoint, "read_draft", lambda directory, target: given)
    (tmp_path / "draft").mkdir()
    config = AuroraConfig(resume="latest", checkpoint_dir=tmp_path / "none", draft=tmp_path / "draft")
    assert models.resolve_draft(config, target) is given
    assert capsys.readouterr().err.endswith(
        f" aurora: no checkpoint in {tmp_path / 'none'} to go on from: learning begins from the start\n"
    )


def cut_short(kept: Path) -> None:
    file = kept / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def empty_facts(kept: Path) -> None:
    (kept / "learner" / "state.json").write_text("")


def facts_that_are_none(kept: Path) -> None:
    (kept / "learner" / "state.json").write_text('{"format": 1, "statistics": null, "provenance": null}')


def state_cut_short(kept: Path) -> None:
    file = kept / "learner" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def no_config(kept: Path) -> None:
    (kept / "config.json").unlink()


@pytest.mark.parametrize("damage", [cut_short, empty_facts, facts_that_are_none, no_config, state_cut_short])
def test_a_damaged_latest_is_passed_over(
    tmp_path: Path, target: Target, kept: Path, damage: Callable[[Path], None], capsys: Any
) -> None:
    newer = Checkpoints(tmp_path / "kept", "run", {}).save(World().draft(), DRAFT, {}, {"steps": 2})
    damage(newer)
    config = AuroraConfig(resume="latest", checkpoint_dir=tmp_path / "kept")
    assert models.resolve_draft(config, target).directory == kept.resolve()
    assert f"{newer}" in (said := capsys.readouterr().err) and said.endswith("; it is passed over\n")
    damage(kept)
    assert resuming.resumed_draft(config, target) is None
    assert capsys.readouterr().err.endswith("to go on from: learning begins from the start\n")
    with pytest.raises(AuroraError):  # who names one means it
        models.resolve_draft(AuroraConfig(resume=kept), target)


def test_a_file_that_may_not_be_read_now_is_not_damaged(
    tmp_path: Path, target: Target, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any, **__: Any) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(AuroraError, match="is no checkpoint"):
        resuming.resumed_draft(AuroraConfig(resume="latest", checkpoint_dir=tmp_path / "kept"), target)


def test_a_checkpoint_that_does_not_say_what_it_is_for_is_refused(tmp_path: Path, target: Target) -> None:
    kept = Checkpoints(tmp_path / "kept", "run", {}).save(World().draft(), DRAFT, {}, {"steps": 2})
    draft = models.resolve_draft(AuroraConfig(resume=kept), target)
    with pytest.raises(AuroraError, match="was trained for another target"):
        models.make_draft(draft, target, AuroraConfig(resume=kept))


def test_another_targets_checkpoint_is_refused(tmp_path: Path, target: Target, kept: Path) -> None:
    config = AuroraConfig(resume=kept)
    wider = Target(**{**vars(target), "hidden_size": 48})
    with pytest.raises(AuroraError, match="its hidden_size is 32, the target's is 48"):
        models.resolve_draft(config, wider)
    other = World(1).save_target(tmp_path / "other")  # a fine-tune: the same shapes, other weights
    tuned = Target(**{**vars(target), "model": "owner/tuned", "directory": other})
    draft = models.resolve_draft(config, tuned)
    with pytest.raises(AuroraError) as caught:
        models.make_draft(draft, tuned, config)
    assert str(caught.value) == (
        f"checkpoint {kept.resolve()} was trained for owner/tiny, not for the weights of owner/tuned; "
        "give it as --aurora-draft to start from its draft alone"
    )
    assert models.resolve_draft(AuroraConfig(draft=kept), tuned).origin == "given"


def test_the_fingerprint_survives_a_copy_and_sees_other_weights(tmp_path: Path, target: Target) -> None:
    first = weights_fingerprint(target.directory)
    shutil.copytree(target.directory, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    os.utime(file, (1, 1))
    assert weights_fingerprint(tmp_path / "copy") == first
    save_file({"lm_head.weight": World(2).lm_head, "model.embed_tokens.weight": World().embedding}, file)
    assert weights_fingerprint(tmp_path / "copy") != first


def test_a_directory_for_checkpoints_is_made_and_must_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resuming.check_checkpoint_dir(AuroraConfig())
    wanted = tmp_path / "a" / "b"
    resuming.check_checkpoint_dir(AuroraConfig(checkpoint_dir=wanted))
    assert wanted.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(AuroraError, match=r"cannot write checkpoints to .*; choose another --aurora-checkpoint-dir"):
        resuming.check_checkpoint_dir(AuroraConfig(checkpoint_dir=tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(AuroraError, match="Permission denied"):
        resuming.check_checkpoint_dir(AuroraConfig(checkpoint_dir=wanted))


def test_provenance_says_what_made_it(target: Target) -> None:
    names = dict.fromkeys(("ring", "bank", "control"), "x")
    shared = Session(
        config=AuroraConfig(seed=3), target=target.directory, draft=Path("/d"), hidden_size=H, num_aux=3,
        dtype="float32", model="owner/tiny", command=("aurora-vllm", "serve"), **names,
    )  # fmt: skip
    facts = json.loads(json.dumps(provenance(shared)))
    assert facts["command"] == ["aurora-vllm", "serve"] and facts["config"]["seed"] == 3
    assert facts["target"] == {
        "model": "owner/tiny",
        "architectures": ["LlamaForCausalLM"],
        "fingerprint": weights_fingerprint(target.directory),
    }
    assert {"python", "torch"} < set(facts["versions"])


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ("serve M --api-key s3cret other --port 3", "serve M --api-key *** *** --port 3"),
        ("--hf-token=s3cret --tokenizer t", "--hf-token=*** --tokenizer t"),
        ("--hf_token s3cret --max-num-batched-tokens 96", "--hf_token *** --max-num-batched-tokens 96"),
        ("--aurora-batch-tokens 32 --num-speculative-tokens=3", "--aurora-batch-tokens 32 --num-speculative-tokens=3"),
    ],
)
def test_no_secret_is_kept(argv: str, kept: str) -> None:
    assert " ".join(without_secrets(argv.split())) == kept
