"""What the README says of settings and commands is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from tools.settings_table import README, with_table

ROOT = README.parent


def test_the_table_of_settings_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tools.settings_table"


def test_commands_and_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists() or link == "docs/images/demo.png", link
    for module in re.findall(r"python -m ([a-z_.]+)", text):
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), module
