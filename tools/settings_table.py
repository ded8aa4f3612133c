"""Updates the table in docs/settings.md from AuroraConfig: ``python -m tools.settings_table``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aurora_vllm.config import AuroraConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
BEGIN, END = "<!-- settings: python -m tools.settings_table -->\n", "<!-- end of settings -->"


def table() -> str:
    """The table, with a row for every field of AuroraConfig."""
    rows = ["| key | default | what |", "|---|---|---|"]
    for name, field in AuroraConfig.model_fields.items():
        rows.append(f"| `{name}` | {_default(field.default)} | {field.description} |")
    return "\n".join(rows) + "\n"


def with_table(document: str) -> str:
    """The document's text with the current table."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def _default(value: Any) -> str:
    return "–" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
