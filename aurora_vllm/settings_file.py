"""Settings in YAML files: in one of ours, in one of Aurora's own, and among vLLM's options in a file of vLLM's.

Each setting comes with its place, which the error message names if the value is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError, SettingsError, unknown
from aurora_vllm.interop import aurora_yaml
from aurora_vllm.interop.aurora_yaml import AuroraFile

KEY_PREFIX = "aurora_"  # of our keys in vLLM's file

Settings = dict[str, tuple[str, Any]]  # AuroraConfig field -> (where it was set, value)


def read(file: Path) -> tuple[Settings, AuroraFile | None]:
    """Read the file of ``--aurora-config``: its settings and, if it is one of Aurora's own, an account of its keys.

    Raises:
        AuroraError: it cannot be read, or is not a mapping.
        SettingsError: unknown keys.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AuroraError(f"cannot read settings file {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise AuroraError(
            f"settings file {file} is not YAML{place}: {getattr(error, 'problem', None) or error}"
        ) from None
    if content is None:  # an empty file
        return {}, None
    if not isinstance(content, dict):
        raise AuroraError(f"settings file {file} is no mapping of keys to values", "write lines like 'ring_mb: 128'")
    if aurora_yaml.is_aurora(content):
        found = aurora_yaml.read(content, file)
        return found.settings, found
    return _known({_field(key): value for key, value in content.items()}, file), None


def in_vllms(vllm_argv: Sequence[str]) -> Settings:
    """The keys ``aurora-...`` in the file of vLLM's own ``--config``. If the file is not readable, vLLM will say so.

    Raises:
        SettingsError: unknown keys with this prefix.
    """
    file = _after_config(vllm_argv)
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    items = content.items() if isinstance(content, dict) else ()
    ours = {_field(key): value for key, value in items if _field(key).startswith(KEY_PREFIX)}
    return _known({key.removeprefix(KEY_PREFIX): value for key, value in ours.items()}, file, KEY_PREFIX)


def _after_config(vllm_argv: Sequence[str]) -> Path | None:
    for word, following in itertools.zip_longest(vllm_argv, vllm_argv[1:]):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
        if word == "--config" and following is not None:
            return Path(following)
    return None


def _field(key: Any) -> str:
    return str(key).replace("-", "_")


def _known(keys: dict[str, Any], file: Path, prefix: str = "") -> Settings:
    known = [prefix + name for name in AuroraConfig.model_fields]
    strange = [prefix + key for key in keys if prefix + key not in known]
    if strange:
        raise SettingsError([unknown(f"unknown key {key} in {file}", key, known) for key in strange])
    return {key: (f"{prefix}{key} in {file}", value) for key, value in keys.items()}
