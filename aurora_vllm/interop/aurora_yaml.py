"""Reads an Aurora YAML file into our settings, with an account of every key in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aurora_vllm.config import AuroraConfig, flag_of
from aurora_vllm.errors import SettingsError, unknown
from aurora_vllm.interop.keys import KEYS, SECTIONS, Key


@dataclass(frozen=True)
class Entry:
    """What became of one key of a file. Unused values are not kept, because some are secrets."""

    key: str
    honoured: bool
    what: str  # what it became, or why it became nothing
    setting: str = ""  # the AuroraConfig field it set


@dataclass(frozen=True)
class AuroraFile:
    """An Aurora file that was read."""

    file: Path
    entries: tuple[Entry, ...]
    settings: dict[str, tuple[str, Any]]  # AuroraConfig field -> (where it was set, value)
    flags: tuple[str, ...]  # options for vLLM
    model: str | None  # the model to serve if the command line names none

    def overridden(self, settings: Mapping[str, tuple[str, Any]]) -> AuroraFile:
        """The same with entries that tell what overrides them. settings: those in force, like ``self.settings``."""

        def judged(entry: Entry) -> Entry:
            if not entry.setting or settings[entry.setting] == self.settings[entry.setting]:
                return entry
            return replace(entry, what=f"{entry.what}, overridden by {settings[entry.setting][0]}")

        return replace(self, entries=tuple(map(judged, self.entries)))

    def summary(self) -> list[str]:
        """Two lines for the log at start."""
        honoured = [
            f"{entry.key} ({entry.what})" if entry.setting or entry.what.startswith("--") else entry.key
            for entry in self.entries
            if entry.honoured
        ]
        others = [entry.key for entry in self.entries if not entry.honoured]
        return [
            f"{self.file} is Aurora's; honoured: {', '.join(honoured) or 'nothing'}",
            f"not honoured, --aurora-plan says why: {', '.join(others) or 'nothing'}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"file": str(self.file), "keys": [asdict(entry) for entry in self.entries]}


def is_aurora(content: Mapping[Any, Any]) -> bool:
    """Whether a YAML file is one of Aurora's, which have sections; ours have none."""
    return any(section in content for section in SECTIONS)


def read(content: Mapping[Any, Any], file: Path) -> AuroraFile:
    """Read a file's content. As in Aurora, a null means that the key is not set.

    Raises:
        SettingsError: unknown keys, wrong values, or two keys that set one setting differently.
    """
    known = {key.name: key for key in KEYS}
    entries: list[Entry] = []
    settings: dict[str, tuple[str, Any]] = {}
    flags: list[str] = []
    model, wrong = None, []
    for name, value in _flatten(content):
        key = known.get(name) or _wildcard(name)
        if name in SECTIONS:
            wrong.append(f"{_where(name, file)}: input should be a mapping of keys to values, not {value!r}")
            continue
        if key is None:
            ours = name.replace("-", "_") in AuroraConfig.model_fields
            hint = f"unknown key {name} in {file}, which is Aurora's; {flag_of(name)} sets ours"
            wrong.append(hint if ours else unknown(f"unknown key {name} in {file}", name, known))
            continue
        if value is None:
            continue
        try:
            ours_value = _convert(key, value)
        except ValueError as error:
            wrong.append(f"{_where(name, file)}: {error}, not {value!r}")
            continue
        if key.setting:
            where, before = settings.setdefault(key.setting, (_where(name, file), ours_value))
            if before != ours_value:
                wrong.append(f"{where} and {name} disagree ({before!r} and {ours_value!r}); give one of them")
        elif key.flag == "MODEL":
            model = str(value) or None
        elif key.flag:
            flags += _flag(key.flag, value)
        entries.append(_entry(key, name, value, ours_value))
    if wrong:
        raise SettingsError(wrong)
    return AuroraFile(file, tuple(entries), settings, tuple(flags), model)


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all entries that are not mappings."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, name + ".")
        elif not (value is None and name in (*SECTIONS, "inference.sglang", "inference.sglang.extra_args")):
            yield name, value


def _wildcard(name: str) -> Key | None:
    return next((key for key in KEYS if key.name.endswith(".*") and name.startswith(key.name[:-1])), None)


def _convert(key: Key, value: Any) -> Any:
    if not (key.setting or key.flag):
        return value
    if isinstance(value, str) and "${" in value:
        raise ValueError("references are not read, write the value out")
    if isinstance(value, list | tuple):
        raise ValueError("input should be one value")
    if key.flag == "--trust-remote-code" and not isinstance(value, bool):
        raise ValueError("input should be true or false")
    return key.convert(value)


def _flag(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, str(value)]


def _entry(key: Key, name: str, value: Any, ours: Any) -> Entry:
    if key.setting:
        shown = str(ours).lower() if isinstance(ours, bool) else ours
        return Entry(name, True, f"{key.setting} = {shown}", key.setting)
    if key.flag == "MODEL":
        return Entry(name, True, key.note)
    if key.flag:
        return Entry(name, True, " ".join(_flag(key.flag, value)) or f"no {key.flag}")
    if key.holds is not None:
        holds = key.holds(value)
        return Entry(name, holds, key.note if holds else key.otherwise or key.note)
    return Entry(name, False, key.note)


def _where(key: str, file: Path) -> str:
    return f"{key} in {file}"
