"""Writes docs/aurora_compatibility.md from tables in aurora_vllm/interop: ``python -m tools.compatibility_table``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aurora_vllm.interop.endpoints import ENDPOINTS
from aurora_vllm.interop.keys import KEYS, SECTIONS, Key

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "aurora_compatibility.md"
HEAD = """# Aurora's configuration and endpoints

Written by `python -m tools.compatibility_table` from `aurora_vllm/interop/`; each row is tested.

## Configuration

`--aurora-config FILE` also takes one of Aurora's own YAML files, which is recognised by its sections. Flags and
environment override it. What it leaves out keeps *our* default, not Aurora's. Each key is honoured or reported: in two
lines at start, and one by one with `--aurora-plan`. An unknown key is an error. A null counts as not given, as in
Aurora. `semantics`, which has no key there, chooses the loss masks of Aurora's release.
"""
ENDPOINTS_HEAD = """
## Endpoints

With `--aurora-sglang-api` they are answered on vLLM's own host and port. Where vLLM asks for an API key (`--api-key`,
`VLLM_API_KEY`), all but the two health endpoints require it too, and answer 401 without it.

| endpoint | of | answer | here |
|---|---|---|---|
"""


def document() -> str:
    """The page's text."""
    parts = [HEAD]
    for section in (*SECTIONS, ""):
        keys = [key for key in KEYS if (key.name.partition(".")[0] if "." in key.name else "") == section]
        parts.append(f"\n### {section or 'Top level'}\n\n| key | Aurora's default | here |\n|---|---|---|\n")
        parts += [f"| `{key.name}` | {_value(key.default)} | {here(key)} |\n" for key in keys]
    parts.append(ENDPOINTS_HEAD)
    parts += [f"| `{e.method} {e.path}` | {e.origin} | {e.answer} | {e.here} |\n" for e in ENDPOINTS]
    parts += _bodies()
    return "".join(parts)


def here(key: Key) -> str:
    """The cell that says how a key is honoured."""
    note = f": {key.note}" if key.note else ""
    if key.setting or key.flag:
        return f"`{key.setting or key.flag}`{note}"
    if key.holds is not None:
        otherwise = f"; if not: {key.otherwise}" if key.otherwise else ""
        return f"honoured if it matches what is done here{note}{otherwise}"
    return f"not honoured{note}"


def _bodies() -> Iterator[str]:
    for endpoint in ENDPOINTS:
        if endpoint.body is None:
            continue
        yield f"\n### Body of `{endpoint.method} {endpoint.path}`\n\n| field | default | here |\n|---|---|---|\n"
        for name, field in endpoint.body.model_fields.items():
            default = "required" if field.is_required() else _value(field.default)
            yield f"| `{name}` | {default} | {field.description} |\n"


def _value(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
