"""Servers as child processes: started on free ports, queried over HTTP, ended whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from aurora_vllm.parent import end_with_parent
from demo import leftovers

PROGRAM = (sys.executable, "-m", "aurora_vllm.entrypoint")
STOP_S = 20.0  # from SIGINT to SIGKILL


class ServerFailed(Exception):
    """A server ended or did not come up; the message has the end of its log."""


class Server:
    """One ``python -m aurora_vllm.entrypoint``, with its log in a file. It ends with the thread that made it."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """
        Args:
            name: for messages.
            arguments: of ``python -m aurora_vllm.entrypoint``; host and port are added.
            log: file for stdout and stderr.
            environment: variables in addition to this process's.
        """
        self.name, self.log = name, log
        self.url = f"http://127.0.0.1:{_free_port()}"
        # One for all queries: a client loads certificates first, 45 ms of a CPU. Once a second, on cores that are busy
        # serving, that made the servers that are queried several percent slower.
        self._client = httpx.Client(base_url=self.url, timeout=5)
        command = [*PROGRAM, *arguments]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2]]
        self.shared_memory_before = leftovers.names()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            # In a session of its own, so that Ctrl-C in the terminal reaches only this process, which ends the servers.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                # If this process is killed. SIGTERM, since plain vLLM's engine stays when its server is killed, too.
                preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_up(self) -> bool:
        """Whether it answers requests.

        Raises:
            ServerFailed: it has ended.
        """
        if self._process.poll() is not None:
            raise ServerFailed(f"server {self.name} ended with code {self._process.returncode}:\n{self.tail()}")
        try:
            return self._client.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def status(self) -> dict[str, Any]:
        """``GET /aurora/status``; empty if it does not answer in time."""
        try:
            response = self._client.get("/aurora/status")
            return response.json() if response.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End it with all processes that it started; idempotent."""
        end_trees([self])


def wait_up(servers: Sequence[Server], timeout_s: float, tick: Callable[[float], None]) -> None:
    """Wait until all answer. ``tick`` is called about once a second with the seconds waited.

    Raises:
        ServerFailed: one ended or was not up in time.
    """
    started = time.monotonic()
    waiting = list(servers)
    while waiting := [server for server in waiting if not server.is_up()]:
        waited = time.monotonic() - started
        if waited > timeout_s:
            raise ServerFailed(f"server {waiting[0].name} is not up after {waited:.0f} s:\n{waiting[0].tail()}")
        tick(waited)
        time.sleep(1)


def end_trees(servers: Sequence[Server]) -> None:
    """End servers by SIGINT, kill processes of theirs that remain, and remove shared memory that was left behind.

    SIGINT goes to the whole process group, as from a terminal: while the engine starts, vLLM's server process waits for
    it and does not react to a signal of its own.
    """
    family = {process for server in servers for process in _tree(server.pid)}
    for process in family:
        _signal(process, signal.SIGCONT)  # a stopped process would not handle SIGINT
    for server in servers:
        if server._process.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_S
    for server in servers:
        try:
            server._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server._process.kill()
            server._process.wait()
    _, alive = psutil.wait_procs([process for process in family if process.is_running()], timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5)

    from aurora_vllm.transport.segment import sweep

    sweep()  # finds nothing unless a server had to be killed
    for server in servers:
        leftovers.remove(server.shared_memory_before)


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process (0: none) while a block of code runs. Used for the learner, so that it does not slow down the
    baseline. Its supervisor does not notice: the process is alive."""
    process = psutil.Process(pid) if pid and psutil.pid_exists(pid) else None
    try:
        if process is not None:
            _signal(process, signal.SIGSTOP)
        yield
    finally:
        if process is not None:
            _signal(process, signal.SIGCONT)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
