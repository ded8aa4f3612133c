"""For kernels that are to be compiled: in this process Triton has been told to interpret them (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from benchmarks import gpu_processes as processes


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function in a process in which Triton compiles, and returns what it returns there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        process, pipe = processes.start(_call, function, arguments)
        result = processes.receive(pipe)  # EOFError where it failed, which it says on stderr
        process.join()
        return result

    return call


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    pipe.send(function(*arguments))
