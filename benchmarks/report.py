"""The format of every benchmark's JSON, and the statistics of a figure.

``write_report`` writes ``{"figures", "spread", "machine", "versions", "command", "seed", ...}``: the measured figures,
the spread of their samples, and what is needed to reproduce them.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aurora_vllm import versions as installed

ROOT = Path(__file__).resolve().parent.parent


def median_and_spread(samples: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and [smallest, lower quartile, upper quartile, largest].

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return statistics.median(ordered), [ordered[0], quartiles[0], quartiles[2], ordered[-1]]


def write_report(
    path: Path, figures: Mapping[str, Any], spread: Mapping[str, Any], seed: int, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a benchmark's result; missing directories are created.

    Args:
        path: the JSON file.
        figures: name to number.
        spread: by the same names, usually from ``median_and_spread``.
        seed: of prompts and weights.
        extra: further entries; those with a name that is already used are left out.
    """
    report = {
        "figures": dict(figures),
        "spread": dict(spread),
        "machine": machine(),
        "versions": versions(),
        "command": command(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    report |= {name: value for name, value in (extra or {}).items() if name not in report}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, default=str)
    text = text.replace(f'"{Path.home()}/', '"~/')  # a home directory's path is private
    path.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system; no host or user name."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """The commit, and the versions of Python and of the relevant packages that are installed."""
    return {"commit": _commit(), **installed.versions((*installed.PACKAGES, "numpy"))}


def command() -> str:
    """The command line, as it would be typed in the project's root."""
    program = Path(sys.argv[0])
    if program.is_absolute() and program.is_relative_to(ROOT):
        module = ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit, with "-dirty" if tracked files differ from it; results and docs are not compared."""
    try:
        commit = _git("describe", "--always")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + "-dirty" * bool(changed)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
