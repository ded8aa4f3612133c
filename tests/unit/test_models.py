"""Where a target or a draft comes from, and what is refused of it."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_vllm import models
from aurora_vllm.errors import AuroraError, one_line_for_os_errors
from tests.unit.vllm_arguments import ARGS


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


def test_what_the_system_refuses_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with pytest.raises(AuroraError, match="File name too long"), one_line_for_os_errors():
        models.fetch("x" * 5000, "model", weights=True)
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(AuroraError, match=rf"^{tmp_path}: Permission denied$"), one_line_for_os_errors():
        models.fetch(str(tmp_path), "model", weights=True)
