"""What may go wrong before serving, said in one line."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

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
        notice(f"error: {line}")
    return EXIT_BAD_INPUT


def notice(text: str) -> None:
    """One line to stderr about the layer itself; vLLM's logger may not be set up yet, or no longer."""
    with contextlib.suppress(OSError, ValueError):  # whoever read the log is gone; what is going on goes on
        print(f"aurora_vllm: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_for_os_errors() -> Iterator[None]:
    """Around what looks at files that the user named: what the system refuses is bad input, too."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise AuroraError(f"{where}{error.strerror or error}") from None
