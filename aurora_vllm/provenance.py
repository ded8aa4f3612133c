"""Where a checkpoint comes from: the command, versions and settings that made it, and the target it is for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from aurora_vllm.config_json import read_config
from aurora_vllm.learner.target import weights_fingerprint
from aurora_vllm.session import Session
from aurora_vllm.versions import versions

_SECRETS = frozenset({"key", "token", "password", "secret"})


def provenance(session: Session) -> dict[str, Any]:
    """What is recorded in every checkpoint of a run, for JSON. Nothing in it comes from the traffic."""
    return {
        "command": list(session.command),
        "config": session.config.model_dump(mode="json"),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {
            "model": session.model,
            "architectures": read_config(session.target).get("architectures") or [],
            "fingerprint": weights_fingerprint(session.target),
        },
    }


def without_secrets(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line in which the values of ``--api-key``, ``--hf-token`` and the like are ``***``."""
    words, secret = [], False
    for word in argv:
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            secret = bool(_SECRETS & set(flag.replace("_", "-").lstrip("-").split("-")))
            words.append(flag + "=***" if secret and equals else word)
        else:
            words.append("***" if secret else word)
    return tuple(words)
