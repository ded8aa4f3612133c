"""Errors that users see, each as one line, and how lines are written to stderr."""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal

EXIT_BAD_INPUT = 2
GET_VLLM = "make setup (CPU), or pip install '.[cuda]' in a checkout"
PLAIN = "--aurora-off serves it as plain vLLM"  # advice about a target or flag that vLLM supports and Aurora does not


class AuroraError(Exception):
    """Bad input. The message is one line: what is wrong, and what to do about it. The program ends with exit code 2."""

    def __init__(self, what: str, do: str = "") -> None:
        self.what = what
        text = f"{what}; {do}" if do else what
        super().__init__(" ".join(text.split()))  # other libraries' messages may have line breaks


class DamagedFile(AuroraError):
    """A file is missing or damaged."""


def unreadable(error: OSError) -> type[AuroraError]:
    """The error to raise for a file that cannot be read. Only a missing one counts as damaged: one without permission,
    or on a disk that fails just now, may be intact."""
    return DamagedFile if isinstance(error, FileNotFoundError | NotADirectoryError) else AuroraError


def first_line(error: BaseException) -> str:
    """The first line of an error's message; CUDA errors continue with advice on debugging torch."""
    return next(iter(str(error).strip().splitlines()), "")


class SettingsError(AuroraError):
    """One or more settings are wrong; ``lines`` has one message for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(" | ".join(lines))
        self.lines = lines


def unknown(what: str, key: str, known: Iterable[str]) -> str:
    """The message about an unknown key, with the most similar known one."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{what}; the nearest is {near[0]}" if near else what


def report(error: AuroraError) -> int:
    """Print the error to stderr, one line per fault, and return the exit code."""
    for line in error.lines if isinstance(error, SettingsError) else [str(error)]:
        _to_stderr(f"aurora_vllm: error: {line}")
    return EXIT_BAD_INPUT


def notice(text: str, level: Literal["INFO", "WARNING"] = "INFO") -> None:
    """Write one line to stderr, with level, time and prefix like those of the worker's log lines.

    vLLM's logger is not used: some of these lines come before vLLM is imported, or from the learner, which never
    imports it; and the thread that ends a hanging server must not wait for a lock that the server may hold.
    """
    _to_stderr(f"{level} {time.strftime('%m-%d %H:%M:%S')} aurora: {text}")


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed or its reader gone: not a reason to stop
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_for_os_errors() -> Iterator[None]:
    """A context in which an OSError, from files that the user named, becomes an AuroraError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise AuroraError(f"{where}{error.strerror or error}") from None
