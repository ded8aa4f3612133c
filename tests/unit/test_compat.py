"""A vLLM's sources against the manifests, without importing it; and the command that shows it."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import cli
from aurora_vllm.errors import AuroraError
from aurora_vllm.spec_decode import compat, fork
from aurora_vllm.spec_decode.compat import compare, fingerprint, fingerprint_of_text
from aurora_vllm.spec_decode.hooks import HOOKS, Hook
from aurora_vllm.spec_decode.scheduler import AuroraScheduler
from aurora_vllm.spec_decode.vllm_sources import NoSuchSymbol, VllmSources

PACKAGE = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
import functools


class Base:
    @property
    @functools.cache
    def speed(self):
        # of light
        return 3

    def step(self, batch, *, dry_run=False):
        def inner():
            return batch
        return inner()
    # a comment between two methods

    async def stop(self): ...
""",
    "vllm/deep/__init__.py": "from ..base import Base as Origin\n",
    "vllm/deep/runner.py": """
from typing import Any
from . import Origin


class Runner(Origin):
    def load(self,
             name):
        return name


@staticmethod
def free(x, y=2): return x
""",
}
SYMBOLS = [
    "vllm.base:Base",
    "vllm.base:Base.step",
    "vllm.base:Base.stop",
    "vllm.deep.runner:Runner.load",
    "vllm.deep.runner:Runner.step",  # inherited through a package that imports it
    "vllm.deep:Origin",
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "vllm-0.99.1+cpu.dist-info").mkdir()
    return tmp_path


@pytest.fixture
def imported(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That package instead of the real one, for one test."""
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in real:
        del sys.modules[name]
    monkeypatch.syspath_prepend(directory)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(real)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_the_text_is_what_inspect_gives(directory: Path, imported: None, symbol: str) -> None:
    thing = compat.resolve(symbol)
    sources = VllmSources(directory)
    assert sources.source(symbol) == inspect.getsource(thing)
    if inspect.isfunction(thing):
        assert sources.parameters(symbol) == set(inspect.signature(thing).parameters)


def test_a_wheel_reads_as_a_directory_does(directory: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in PACKAGE.items():
            archive.writestr(name, text)
        archive.writestr("vllm-0.99.1.dist-info/METADATA", "")
    from_wheel, from_directory = VllmSources(wheel), VllmSources(directory)
    assert from_wheel.version == from_directory.version == "0.99.1"
    for symbol in SYMBOLS:
        assert from_wheel.source(symbol) == from_directory.source(symbol)


@pytest.mark.parametrize("symbol", ["vllm.gone:a", "vllm.base:Gone", "vllm.base:Base.gone", "vllm.deep.runner:Any.x"])
def test_what_is_not_there(directory: Path, symbol: str) -> None:
    with pytest.raises(NoSuchSymbol):
        VllmSources(directory).source(symbol)


def test_no_vllm_here(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="holds no vLLM"):
        VllmSources(tmp_path)


def test_same_changed_missing(directory: Path) -> None:
    sources = VllmSources(directory)
    hooks = tuple(Hook(symbol) for symbol in SYMBOLS[:2])
    known = {hook.symbol: fingerprint_of_text(sources.source(hook.symbol)) for hook in hooks}
    assert [finding.state for finding in compare(sources, known, hooks)] == ["same", "same"]
    assert [finding.state for finding in compare(sources, {}, hooks)] == ["changed", "changed"]
    lacking = (Hook("vllm.base:Base.step", ("batch", "dry_run", "weather")), Hook("vllm.base:Base.walk"))
    findings = compare(sources, known, lacking)
    assert [finding.state for finding in findings] == ["missing", "missing"]
    assert "no parameter weather" in findings[0].detail


def test_what_a_hook_does_not_use_any_more_is_missed(
    directory: Path, imported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attribute that vLLM renamed could still be set, and nobody would read it."""
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.1")
    symbol = "vllm.base:Base.step"
    sources = VllmSources(directory)
    known = {symbol: fingerprint_of_text(sources.source(symbol))}
    uses, misses = Hook(symbol, uses=("batch",)), Hook(symbol, uses=("batch", "bat"))
    assert compare(sources, known, (uses,))[0].state == "same"
    assert compare(sources, known, (misses,))[0].detail.startswith("it does not use bat;")
    probes = compat.probe((uses, misses))
    assert [probe.ok for probe in probes] == [True, False] and "does not use bat;" in probes[1].detail


@pytest.mark.parametrize(
    ("version", "changed"),
    [
        ("0.32.0", set()),
        ("0.33.0", {"propose_draft_token_ids", "schedule", "update_from_output", "compile_or_warm_up_model"}),
    ],
)
def test_the_manifests_cover_every_hook(version: str, changed: set[str]) -> None:
    manifest = compat.read_manifest(version)
    assert manifest["run"] == (version in compat.WAS_RUN)
    assert set(manifest["fingerprints"]) == set(manifest["why"]) == {hook.symbol for hook in HOOKS}
    tested = compat.known_fingerprints("0.32.0")
    v1 = {hook.symbol for hook in HOOKS if ".worker.gpu." not in hook.symbol}
    moved = {symbol.rpartition(".")[2] for symbol in v1 if manifest["fingerprints"][symbol] != tested[symbol]}
    assert moved == changed


def test_the_installed_vllm_is_the_tested_one() -> None:
    """What the continuous integration checks: read and imported, every symbol is the manifest's."""
    sources = VllmSources.installed()
    assert sources.version in compat.WAS_RUN
    known = compat.known_fingerprints(sources.version)
    assert {finding.state for finding in compare(sources, known)} == {"same"}
    assert {hook.symbol: fingerprint(compat.resolve(hook.symbol)) for hook in HOOKS} == known
    assert {(probe.detail, probe.tested) for probe in compat.probe()} == {("the tested source", True)}
    assert json.loads(compat.write_manifest(sources))["fingerprints"] == known


def test_a_version_that_was_only_read_is_not_called_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "WAS_RUN", ())
    assert all(probe.ok and not probe.tested and "only read" in probe.detail for probe in compat.probe())


def test_a_build_of_a_version_is_that_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.metadata, "version", lambda _: f"{VllmSources.installed().version}+cpu")
    assert {probe.detail for probe in compat.probe()} == {"the tested source"}


def test_the_command(directory: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["check-vllm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["same"] * len(HOOKS)
    (other,) = set(compat.WAS_RUN) - {VllmSources.installed().version}
    assert cli.main(["check-vllm", "--against", other]) == 0
    out = capsys.readouterr().out
    assert f"compared with {other} (run)" in out
    assert "changed vllm.v1.core.sched.scheduler:Scheduler.schedule" in out
    with monkeypatch.context() as patch:
        patch.setattr(compat, "WAS_RUN", ())
        assert cli.main(["check-vllm", "--against", other]) == 0
    assert f"compared with {other} (only read)" in capsys.readouterr().out
    assert cli.main(["check-vllm", "--sources", str(directory)]) == 1
    assert "missing vllm.v1.worker.gpu_worker:Worker.load_model" in capsys.readouterr().out
    for wrong in (["--against", "0.1"], ["--sources", str(directory / "nowhere")]):
        assert cli.main(["check-vllm", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_fork_under_our_own_classes_is_hooked_once() -> None:
    assert fork.advise(object.__new__(AuroraScheduler)) is None
    assert fork.attach(object()) is None  # no session
    assert fork.advise(object()) is None
