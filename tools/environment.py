"""The project's virtual environment: made from a lock file, and then recognised by a stamp.

    python3 tools/environment.py ensure VENV [LOCK]     install the lock's packages; nothing to do if the stamp matches
    python3 tools/environment.py freeze VENV            print a lock with the environment's packages

Needs only the standard library, because it installs everything else. An interrupted installation is resumed: packages
that were half unpacked are removed first.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_LOCK = ROOT / "requirements" / "cpu.lock"
LEFT_OUT = {"pip", "aurora-vllm", "torchvision", "torchaudio", "torchcodec"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # "+cpu" builds of torch are not on PyPI


def ensure(venv: Path, lock: Path) -> None:
    """Install the lock's packages and, as editable, this checkout into ``venv``; make it first if needed."""
    wanted = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    stamp, started, checkout = venv / ".stamp", venv / ".started", venv / ".checkout"
    if _text(stamp) != wanted:
        if _text(started) != wanted:
            _create(venv)
            started.write_text(wanted)
        _take_back_half_installed(venv)
        print(f"installing {_count(lock)} packages into {venv}", flush=True)
        _install(venv, lock)
        stamp.write_text(wanted)
    if _text(checkout) != str(ROOT):
        _pip(venv, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        checkout.write_text(str(ROOT))


def freeze(venv: Path) -> str:
    """A lock with the packages of ``venv``."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "freeze", "--all", "--exclude-editable"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    header = [line for line in DEFAULT_LOCK.read_text().splitlines() if line.startswith("#")]
    only_x86 = ' ; platform_machine == "x86_64"'
    pins = [
        line + (only_x86 if line.startswith("intel-") else "")
        for line in lines
        if line.split("==")[0].lower().replace("_", "-") not in LEFT_OUT
    ]
    return "\n".join(header + pins)


def _create(venv: Path) -> None:
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"{venv} exists and is not a virtual environment: move it away, or choose another with VENV=")
    if sys.version_info < (3, 11):  # noqa: UP036 (any Python may run this file)
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: give another with PYTHON=")
    print(f"making {venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)


def _install(venv: Path, lock: Path) -> None:
    torch = [line for line in lock.read_text().splitlines() if line.startswith("torch==")]
    # torch first: from where pip is configured to look (a mirror, a folder), else from PyTorch's own index.
    if torch and not _pip(venv, "install", "--no-deps", *torch, check=False):
        print(f"pip did not find {torch[0]}: installing it from {TORCH_CPU_INDEX}", flush=True)
        _pip(venv, "install", "--no-deps", "--extra-index-url", TORCH_CPU_INDEX, *torch)
    _pip(venv, "install", "--no-deps", "-r", str(lock))


def _pip(venv: Path, *arguments: str, check: bool = True) -> bool:
    flags = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments, *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if check and done.returncode:
        sys.exit(f"pip failed ({done.returncode}); the next `make setup` resumes here: {' '.join(command)}")
    return done.returncode == 0


def _take_back_half_installed(venv: Path) -> None:
    """Remove packages without a complete RECORD, which pip writes last: it would take them for installed."""
    for site in venv.glob("lib/python*/site-packages"):
        for info in site.glob("*.dist-info"):
            if "INSTALLER" not in _text(info / "RECORD"):
                shutil.rmtree(info)
        for moved_away in site.glob("~*"):
            shutil.rmtree(moved_away, ignore_errors=True)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _count(lock: Path) -> int:
    return sum("==" in line for line in lock.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["ensure", "freeze"])
    parser.add_argument("venv", type=Path)
    parser.add_argument("lock", type=Path, nargs="?", default=DEFAULT_LOCK)
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    if arguments.command == "freeze":
        print(freeze(venv))
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    with (venv.parent / f".{venv.name.lstrip('.')}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # of two `make` at once, the second waits
        ensure(venv, arguments.lock)


if __name__ == "__main__":
    main()
