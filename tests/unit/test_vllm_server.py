"""vLLM's own command line, wherever a version keeps its parts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import vllm_server
from aurora_vllm.vllm_server import UnknownLayout, VllmServer


def hide(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """As if no place that this vLLM could keep something in held it."""
    find = vllm_server._first

    def first(*places: str, **how: Any) -> Any:
        return find(*(place + "?" if word in place else place for place in places), **how)

    monkeypatch.setattr(vllm_server, "_first", first)


def test_the_installed_vllm_is_served_with_its_own_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(vllm_server, "_spawn_workers", lambda: pytest.fail("vLLM moved its own, say where to"))
    args = VllmServer().parse(["some/model", "--port", "3"])
    assert (args.model, args.port) == ("some/model", 3)
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_vllms_file_may_hold_settings_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("aurora_ring_mb: 3\naurora-learn: true\naurora-prompt-lookup: false\naurora-seed:\nport: 3\n")
    args = VllmServer().parse(["some/model", "--config", str(file)])
    assert (args.model, args.port) == ("some/model", 3)
    assert not [name for name in vars(args) if "aurora" in name]


def test_a_vllm_that_prepares_elsewhere_is_served_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.33 moved it, and where this is not found is no reason to serve plain."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    hide(monkeypatch, "cli_env_setup")
    assert VllmServer().parse(["some/model"]).model == "some/model"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_vllms_console_script_runs_with_the_cpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(vllm_server.os, "execv", lambda program, command: ran.append(command))
    vllm_server.run_as_program(["--port", "3", "--model=M"])
    assert ran[0][3:] == ["serve", "M", "--port", "3"]
    shown = subprocess.run([*ran[0][:3], "--version"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split()[-1].startswith("0.")


def test_a_vllm_without_the_command_is_of_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "cmd_init")
    with pytest.raises(UnknownLayout, match="cmd_init"):
        VllmServer()
