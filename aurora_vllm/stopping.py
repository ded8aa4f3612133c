"""Ctrl-C and SIGTERM end the server, at any point and for good.

vLLM alone does not ensure that. While it starts, its handler of SIGTERM raises KeyboardInterrupt; inside pyzmq's poll,
where most of the start is spent, this exception is swallowed and the signal lost. SIGINT only cancels an asyncio task,
which takes effect when the model is loaded. So the first such signal is noted here, whoever's handler it is for, and
starts a clock: if the process still exists when it runs out, a thread ends it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from aurora_vllm.errors import notice
from aurora_vllm.proc_stat import is_alive, stat_fields

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 8.0  # vLLM's own shutdown takes a second or two, more on a busy machine

at_once: list[Callable[[], None]] = []  # called at the first signal, beside vLLM's own shutdown
cleanups: list[Callable[[], None]] = []  # called before the process is ended from the thread


class StopGuard:
    """Handles SIGINT, SIGTERM and SIGHUP for as long as the process lives. Make one, in the main thread.

    It replaces :func:`signal.signal` in this process, because vLLM and asyncio set handlers of their own later. Those
    are wrapped, so that the signal is noted before they are called, once; resetting to the default brings back ours.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # the signal that came first
        self.grace_s = GRACE_S
        self._set_handler = signal.signal
        signal.signal = self._signal  # type: ignore[assignment]
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                self._set_handler(number, functools.partial(self._stop, _interrupt))

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that was ended by a signal."""
        return 128 + (self.number or 0)

    def leave(self, code: int) -> None:
        """End the process if a signal came; else return.

        By os._exit: in the interpreter's own shutdown a vLLM that was stopped while it started sometimes hangs, and the
        thread with the clock no longer runs.
        """
        if self.number is not None:
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    def _signal(self, number: int, handler: Any) -> Any:
        """In place of signal.signal."""
        noted = isinstance(handler, functools.partial) and handler.func == self._stop  # a wrapped one, put back
        if number in STOPS and handler is not signal.SIG_IGN and not noted:
            handler = functools.partial(self._stop, handler if callable(handler) else _interrupt)
        return self._set_handler(number, handler)

    def _stop(self, handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
        if self.number is not None:  # a second Ctrl-C must not interrupt the clean-up
            return
        self.number = number
        threading.Thread(target=self._end, name="aurora-stop", daemon=True).start()
        handler(number, frame)

    def _end(self) -> None:
        for stop in at_once:  # each on a thread: whatever it waits for, the clock runs
            threading.Thread(target=stop, name="aurora-stop-at-once", daemon=True).start()
        time.sleep(self.grace_s)
        try:
            signal_name = signal.Signals(self.number or 0).name
            notice(f"still here {self.grace_s:.0f} s after {signal_name}: ending all processes", "WARNING")
            end_descendants()
            for cleanup in cleanups:
                cleanup()
        finally:
            os._exit(self.exit_code)


def end_descendants(patience_s: float = 1.0) -> None:
    """End all descendants of this process: SIGTERM, then after patience_s SIGKILL."""
    # Except multiprocessing's resource tracker, which removes vLLM's shared memory once this process is gone.
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    pids = [pid for pid in _descendants(os.getpid()) if pid != tracker]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience_s
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := stat_fields(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    waiting = [root]
    while waiting:
        found = children.get(waiting.pop(), [])
        yield from found
        waiting += found


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
