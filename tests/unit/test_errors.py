"""What is said before serving and beside it, on stderr."""

from __future__ import annotations

import re
from typing import Any

from aurora_vllm.errors import AuroraError, notice, report


def test_a_notice_begins_as_the_workers_lines_do(capsys: Any) -> None:
    notice("it goes on")
    notice("it does not", "WARNING")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"INFO \d\d-\d\d \d\d:\d\d:\d\d aurora: it goes on", first)
    assert second.startswith("WARNING ") and second.endswith(" aurora: it does not")


def test_bad_input_is_said_by_the_program(capsys: Any) -> None:
    assert report(AuroraError("what", "do")) == 2
    assert capsys.readouterr().err == "aurora_vllm: error: what; do\n"
