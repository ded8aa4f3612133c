"""The learner as a child process: started late, at low priority, restarted with back-off, never left behind.

The learner never outlives the server: it is stopped at exit, and killed by the kernel if the server is killed (it may
die at any point of a publish). Run as a program, this module is the step between fork and learner::

    python -m aurora_vllm.supervisor PARENT_PID NICE COMMAND...
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_vllm.errors import notice
from aurora_vllm.parent import end_with_parent
from aurora_vllm.pulse import Pulse

if TYPE_CHECKING:
    from aurora_vllm.transport.control import ServerBlock

LEARNER = (sys.executable, "-m", "aurora_vllm.learner.process")
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
STABLE_S = 60.0  # after a life this long the back-off starts over
STOP_S = 3.0  # from SIGTERM to SIGKILL
SAVE_S = 15.0  # likewise, for a learner that writes a last checkpoint
LOOK_S = 0.2  # between two looks at a running learner
# A learner without a heartbeat for this long, or for this much CPU time, hangs (pulse.py). Far more than it ever needs:
# ending one that works would cost what it learned since its last checkpoint.
HANG_S, HANG_CPU_S = 1800.0, 600.0


class Supervisor(threading.Thread):
    """Keeps one learner running from :meth:`start` to :meth:`stop`.

    One thread forks every learner, because the kernel sends PDEATHSIG when the *thread* that forked ends.
    """

    def __init__(
        self,
        block: ServerBlock,
        ready: Callable[[], bool],
        threads: int,
        nice: int,
        command: Sequence[str] = LEARNER,
        waits: tuple[float, float] = (FIRST_WAIT_S, LONGEST_WAIT_S),
        stable_s: float = STABLE_S,
        stop_s: float = STOP_S,
        heartbeat: Callable[[], int] = lambda: 0,
        hang_s: float = math.inf,
        hang_cpu_s: float = math.inf,
    ) -> None:
        """
        Args:
            block: where the learner's pid and the number of restarts are written.
            ready: whether the learner may start; asked twice a second. Not before the engine is up: vLLM measures
                memory and speed while it starts.
            threads: for the learner's arithmetic.
            nice: added to the learner's niceness, 0..19.
            command: what to run.
            waits: first and longest wait before a restart, seconds.
            stable_s: after a life this long the waits start over with the first.
            stop_s: from SIGTERM to SIGKILL.
            heartbeat: a number that changes as long as the learner lives.
            hang_s, hang_cpu_s: a learner without a heartbeat for ``hang_s`` seconds in which it uses no CPU, or for
                ``hang_cpu_s`` seconds of CPU time, is ended, and another one started.
        """
        super().__init__(name="aurora-learner-supervisor", daemon=True)
        self._block = block
        self._ready = ready
        self._environment = learner_environment(os.environ, threads)
        self._command = (str(nice), *command)
        self._first_wait, self._longest_wait = waits
        self._stable_s, self._stop_s = stable_s, stop_s
        self._heartbeat, self._hang_looks, self._hang_cpu_s = heartbeat, hang_s / LOOK_S, hang_cpu_s
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._ready():
            if self._stopping.wait(0.5):
                return
        wait = self._first_wait
        while not self._stopping.is_set():
            lived, end = self._one_life()
            if self._stopping.is_set():
                return
            if lived >= self._stable_s:
                wait = self._first_wait
            self._block.learner_restarts += 1
            again = f"serving goes on; it starts again in {wait:.0f} s"
            notice(f"the learner {end} after {lived:.0f} s; {again}", "WARNING")
            if self._stopping.wait(wait):
                return
            wait = min(2 * wait, self._longest_wait)

    def stop(self) -> None:
        """End the learner and the thread. Idempotent; takes at most twice `stop_s` (6 s, or 30 s where it saves)."""
        self._stopping.set()
        if self.ident is not None:  # it was started
            self.join()

    def _one_life(self) -> tuple[float, str]:
        """Run one learner until it ends, or until :meth:`stop`. Returns the seconds it lived and, in words, its end."""
        started = time.monotonic()
        program = [sys.executable, "-m", "aurora_vllm.supervisor", str(os.getpid()), *self._command]
        try:
            # Its own process group: Ctrl-C in the terminal is for the server, which then ends the learner. But the
            # server's session: with the kernel's autogroup scheduling, sessions share the CPU equally and niceness
            # counts only within one, so a learner in a session of its own would get as much as the whole server.
            process = subprocess.Popen(program, env=self._environment, stdin=subprocess.DEVNULL, process_group=0)
        except OSError as error:
            return 0.0, f"could not be started ({error.strerror})"
        self._block.learner_pid = process.pid
        pulse, hangs = Pulse(process.pid, self._heartbeat, self._hang_looks, self._hang_cpu_s), False
        try:
            while process.poll() is None:
                if self._stopping.wait(LOOK_S):
                    end_process(process, self._stop_s)
                    break
                if hangs := pulse.hangs():
                    end_process(process, STOP_S)
                    break
        finally:
            self._block.learner_pid = 0
        code = process.returncode
        if code is None:
            end = "does not end"
        elif hangs:
            end = "showed no sign of life and was ended"
        else:
            end = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return time.monotonic() - started, end


def end_process(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """SIGTERM, then SIGKILL, each followed by patience_s. A process in uninterruptible I/O may be left behind."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def learner_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """The server's environment, with the learner's number of threads for every library that starts threads."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**environment, **counts}


def become_background(parent_pid: int, nice: int) -> None:
    """Give this process a low priority, and have it end with its parent.

    Not SCHED_IDLE: under full load nothing is idle (vLLM's OpenMP threads spin while they wait for one another), and a
    learner that starves can never make that load lighter.

    Args:
        parent_pid: the parent's.
        nice: added to the niceness. That alone is no bound: vLLM's threads sleep now and then, and at nice 10 the
            learner took half a CPU beside them. What bounds it is its budget (learner/budget.py).

    Raises:
        SystemExit: the parent is gone already.
    """
    if not end_with_parent(parent_pid):
        raise SystemExit(1)
    os.nice(nice)
    with contextlib.suppress(OSError):  # if memory runs out, the kernel is to kill this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    become_background(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])  # all of the above survives exec
