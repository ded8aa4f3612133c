"""Where a target or a draft comes from, and what is refused of it."""

from __future__ import annotations

import errno
import os
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from aurora_vllm import models
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.config_json import read_config
from aurora_vllm.errors import AuroraError, one_line_for_os_errors
from aurora_vllm.learner import day0
from tests.unit.plan_world import TARGET, change_config, draft_dir, target
from tests.unit.vllm_arguments import ARGS

__all__ = ["draft_dir", "target"]  # fixtures


def test_where_a_checkpoint_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        if name == "not/there":
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.fetch(str(tmp_path), "model", weights=True) == tmp_path
    assert not calls
    assert models.fetch("owner/name", "model", weights=False, revision="r") == tmp_path / "snapshot"
    assert "*.safetensors" not in calls[0]["allow_patterns"]
    assert calls[0]["revision"] == "r"
    models.fetch("gpt2", "model", weights=True)
    assert "*.safetensors" in calls[1]["allow_patterns"]
    with pytest.raises(AuroraError, match=r"model not/there .* \(404 Client Error\); check the name and the network"):
        models.fetch("not/there", "model", weights=True)
    (tmp_path / "file").touch()
    with pytest.raises(AuroraError, match=r"draft .*file is a file"):
        models.fetch(str(tmp_path / "file"), "draft", weights=True)
    for path in ("./nowhere", "~/nowhere", "/nowhere", "a/b/c"):
        with pytest.raises(AuroraError, match="does not exist"):
            models.fetch(path, "model", weights=True)
    assert len(calls) == 3


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(**(ARGS | {"model": str(tmp_path)}))
    (tmp_path / "config.json").write_text('{"speculators_config": {"verifier": {"name_or_path": "owner/target"}}}')
    with pytest.raises(AuroraError, match=r"is a draft; serve its target \(owner/target\)"):
        models.resolve_target(args, weights=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AuroraError, match="holds no"):
        models.resolve_target(args, weights=True)
    monkeypatch.setattr(models, "_vllm_model_config", lambda _: SimpleNamespace(runner_type="pooling"))
    with pytest.raises(AuroraError, match="does not generate text"):
        models.resolve_target(args, weights=False)
    opt = SimpleNamespace(runner_type="generate", architecture="OPTForCausalLM")
    monkeypatch.setattr(models, "_vllm_model_config", lambda _: opt)
    with pytest.raises(AuroraError, match=r"vLLM takes no EAGLE-3 draft for .* \(its OPTForCausalLM\); --aurora-off"):
        models.resolve_target(args, weights=False)


def test_what_the_system_refuses_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with pytest.raises(AuroraError, match="File name too long"), one_line_for_os_errors():
        models.fetch("x" * 5000, "model", weights=True)
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(AuroraError, match=rf"^{tmp_path}: Permission denied$"), one_line_for_os_errors():
        models.fetch(str(tmp_path), "model", weights=True)


def test_the_revision_of_a_draft_on_the_hub(target: Target, draft_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, kind: str, weights: bool, revision: str | None = None) -> Path:
        assert (name, kind, revision) == ("owner/draft", "draft", "r")
        return draft_dir

    monkeypatch.setattr(models, "fetch", fetch)
    assert models.resolve_draft(AuroraConfig(draft=Path("owner/draft")), target, "r").directory == draft_dir


def test_the_planned_day0_draft_is_the_one_that_is_made(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TARGET.items() if k != "architectures"}))
    model.save_pretrained(target.directory)
    config = AuroraConfig(cache_dir=tmp_path / "cache", draft_vocab_size=64)
    planned = models.resolve_draft(config, target)
    assert planned.origin == "day-0, to be made"
    assert planned.directory.parent == tmp_path / "cache" / "day0"
    made = models.make_draft(planned, target, config)
    assert made == planned  # layers, vocabulary, names, shapes and dtypes
    again = models.resolve_draft(config, target)
    assert again == replace(planned, origin="day-0, cached")
    written = (again.directory / "model.safetensors").stat().st_mtime_ns
    models.make_draft(again, target, config)
    assert (again.directory / "model.safetensors").stat().st_mtime_ns == written

    weights = again.directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # a disk that was full, an upload cut short
    assert models.make_draft(again, target, config) == again
    assert len(load_file(weights)) > 0

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(day0, "save_file", full)
        unmade = AuroraConfig(cache_dir=tmp_path / "full", draft_vocab_size=64)
        with pytest.raises(AuroraError, match="No space left on device; choose another --aurora-cache-dir"):
            models.make_draft(models.resolve_draft(unmade, target), target, unmade)

    (tmp_path / "file").write_text("")  # a cache that cannot be written
    config = AuroraConfig(cache_dir=tmp_path / "file", draft_vocab_size=64)
    with pytest.raises(AuroraError, match="choose another --aurora-cache-dir"):
        models.make_draft(models.resolve_draft(config, target), target, config)


def test_servers_that_start_together_make_one_draft(target: Target, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TARGET.items() if k != "architectures"})).save_pretrained(
        target.directory
    )
    config = AuroraConfig(cache_dir=tmp_path / "cache", draft_vocab_size=64)
    planned, made = models.resolve_draft(config, target), []
    threads = [
        threading.Thread(target=lambda: made.append(models.make_draft(planned, target, config))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [planned] * 6
    assert [path.name for path in planned.directory.parent.iterdir()] == [planned.directory.name]


def test_targets_no_day0_draft_can_be_made_from(target: Target, tmp_path: Path) -> None:
    config = AuroraConfig(cache_dir=tmp_path)
    layers = read_config(target.directory)["num_hidden_layers"]
    change_config(target.directory, num_hidden_layers=1)
    with pytest.raises(AuroraError, match=r"owner/target: .* at least 2 layers.* give one with --aurora-draft"):
        models.resolve_draft(config, target)
    change_config(target.directory, num_hidden_layers=layers)
    planned = models.resolve_draft(config, target)
    with pytest.raises(
        AuroraError, match=r"owner/target: no day-0 draft .* no tensor .*; give one with --aurora-draft"
    ):
        models.make_draft(planned, target, config)
    assert not list(tmp_path.glob("**/*.safetensors")) or not planned.directory.exists()
