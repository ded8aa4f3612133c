"""Ctrl-C, a closed terminal and SIGTERM end the program in the same way, and do not interrupt the clean-up."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_on_signals() -> None:
    """From now on, every ending signal raises SystemExit in the main thread, with the shell's exit code for it."""
    for number in ENDINGS:
        signal.signal(number, _end)


@contextmanager
def held() -> Iterator[list[int]]:
    """Hold ending signals back while the block runs. Yields the list of those that arrive; they are not sent again."""
    came: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: came.append(n)) for number in ENDINGS}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
