"""What may go wrong before serving, said in one line."""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal

EXIT_BAD_INPUT = 2
GET_VLLM = "make setup (CPU), or pip install '.[cuda]' in a checkout"
PLAIN = "--aurora-off serves it as plain vLLM"  # what to do about a target or a flag that only Aurora cannot take


class AuroraError(Exception):
    """Bad input. The message is one line: what is wrong; what to do about it. Ends the program with exit code 2."""

    def __init__(self, what: str, do: str = "") -> None:
        self.what = what
        text = f"{what}; {do}" if do else what
        super().__init__(" ".join(text.split()))  # messages of other libraries come with line breaks


class DamagedFile(AuroraError):
    """A file that is not there, or not whole, where one should be."""


def unreadable(error: OSError) -> type[AuroraError]:
    """What kind of error it is that a file cannot be read: one that may not be read, or not now, is not damaged."""
    return DamagedFile if isinstance(error, FileNotFoundError | NotADirectoryError) else AuroraError


def first_line(error: BaseException) -> str:
    """Of what it says; errors of CUDA go on with advice to who debugs torch."""
    return next(iter(str(error).strip().splitlines()), "")


class SettingsError(AuroraError):
    """One or more settings are wrong; ``lines`` holds one message each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(" | ".join(lines))
        self.lines = lines


def unknown(what: str, key: str, known: Iterable[str]) -> str:
    """A message about a key nobody knows, with the nearest that is known."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{what}; the nearest is {near[0]}" if near else what


def report(error: AuroraError) -> int:
    """Print the error to stderr, a line per fault, and return the exit code."""
    for line in error.lines if isinstance(error, SettingsError) else [str(error)]:
        _to_stderr(f"aurora_vllm: error: {line}")
    return EXIT_BAD_INPUT


def notice(text: str, level: Literal["INFO", "WARNING"] = "INFO") -> None:
    """One line to stderr about the layer itself, with level, time and prefix of what the worker logs.

    Not by vLLM's logger: some of it is said before vLLM is imported, or by the learner, which never imports it; and the
    thread that ends a server that hangs must not wait for a lock that server may hold.
    """
    _to_stderr(f"{level} {time.strftime('%m-%d %H:%M:%S')} aurora: {text}")


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read the log is gone; what is going on goes on
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_for_os_errors() -> Iterator[None]:
    """Around what looks at files that the user named: what the system refuses is bad input, too."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise AuroraError(f"{where}{error.strerror or error}") from None
