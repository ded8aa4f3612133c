"""The ``config.json`` of a checkpoint, a target's or a draft's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aurora_vllm.errors import DamagedFile, unreadable


def read_config(directory: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        DamagedFile: there is no such file, or it is not a JSON object.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(error)(
            f"{directory} is no checkpoint: cannot read its config.json ({error.strerror})"
        ) from None
    except ValueError as error:
        raise DamagedFile(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DamagedFile(f"{file} is no JSON object")
    return config


def read_text_config(directory: Path) -> dict[str, Any]:
    """As :func:`read_config`; of a multimodal target, its language model's keys override the outer ones."""
    config = read_config(directory)
    return config | dict(config.get("text_config") or {})


def quantization(config: dict[str, Any]) -> Any:
    """What a ``config.json`` says about quantized weights, under either of its two names; nothing (falsy) where they
    are not."""
    return config.get("quantization_config") or config.get("compression_config")


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write it indented, for people to read."""
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
