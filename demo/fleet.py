"""Servers that run side by side and are used in turn: started on demand, none left behind."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
from rich.console import Console

from demo.client import drive
from demo.servers import Server, ServerFailed, end_trees, paused, wait_up
from demo.serving import MODEL_NAME
from demo.signals import held
from demo.workload import Prompt


@contextmanager
def failure_told(console: Console, what: str, logs: str) -> Iterator[None]:
    """If a server fails while the block runs, or the block is stopped: print a line or two, and raise SystemExit.

    Args:
        what: the program's name, with which the line begins.
        logs: path of the servers' logs.
    """
    try:
        yield
    except (ServerFailed, httpx.HTTPError) as error:
        console.print(f"{what} failed: {error or type(error).__name__}", style="red", highlight=False)
        console.print(f"logs: {logs}", highlight=False)
        raise SystemExit(1) from None
    except SystemExit:
        console.print("stopped; no server is left running")
        raise


class Fleet:
    """Servers by name. ``close`` ends them all; so does the end of the interpreter.

    Args:
        environment: variables for every server, in addition to this process's.
        logs: directory for their logs, ``NAME.log``.
    """

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment, self._logs = environment, logs
        self._servers: dict[str, Server] = {}
        atexit.register(self.close)

    def __getitem__(self, name: str) -> Server:
        return self._servers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._servers

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start one, without waiting until it is up.

        Raises:
            SystemExit: an ending signal arrived meanwhile.
        """
        with held() as came:  # a server that is running but not yet in the list would be left behind
            self._servers[name] = Server(name, arguments, self._logs / f"{name}.log", self._environment)
        if came:
            raise SystemExit(128 + came[0])

    def wait_up(self, names: Sequence[str], timeout_s: float, tick: Callable[[float], None], warm_up: int) -> None:
        """Wait until these answer, then send each ``warm_up`` short requests at once: kernels and allocators warm up.

        Raises:
            ServerFailed, httpx.HTTPError: one ended, was not up in time, or refused a request.
        """
        wait_up([self._servers[name] for name in names], timeout_s, tick)
        hello = [Prompt("hello", "Say hello.")] * warm_up
        for name in names:
            asyncio.run(drive(name, self._servers[name].url, MODEL_NAME, hello, warm_up, 8))

    def learner_paused(self, name: str) -> AbstractContextManager[None]:
        """Stop a server's learner while a block of code runs; do nothing if there is none."""
        status = self._servers[name].status() if name in self._servers else {}
        return paused(status.get("learner", {}).get("pid", 0))

    def stop(self, names: Sequence[str]) -> None:
        """End these, with all processes that they started."""
        with held() as came:
            end_trees([self._servers.pop(name) for name in names])
        if came:
            raise SystemExit(128 + came[0])

    def close(self) -> None:
        """End all servers; idempotent."""
        with held():
            end_trees(list(self._servers.values()))
            self._servers.clear()
