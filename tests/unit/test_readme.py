"""What the README says of settings and commands is what there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tools.settings_table import DOCUMENT, with_table

ROOT = DOCUMENT.parent.parent
README = ROOT / "README.md"


def test_the_table_of_settings_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tools.settings_table"


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_commands_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists() or link == "docs/images/demo.png", link
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        assert importlib.util.find_spec(module.rstrip(".")), module
