"""An Engine in a process of its own, for a vLLM that cannot live in the test's.

Ring, bank and control block are shared memory, so the test reads and writes them itself. The rest goes through
``Engine.run``: a function and its arguments travel to the other process, the answer comes back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.segment import Segment
from benchmarks.engine import Engine


@dataclass
class RemoteEngine(Engine):
    """Looks like an Engine; ``scheduler``, ``attachment`` and ``llm`` are in the other process only."""

    connection: Connection
    process: subprocess.Popen[bytes]

    @classmethod
    def launch(cls, target: Path, directory: Path, environment: dict[str, str], **arguments: Any) -> RemoteEngine:
        """Start it; what it prints is in ``directory/engine.log``.

        Args:
            environment: over this process's own, less what is aurora's.
            arguments: of Engine.start.
        """
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("AURORA_") and name != "TRITON_INTERPRET"
        }
        connection, theirs = Pipe()
        with theirs, (directory / "engine.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=own | environment,
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        session = _ask(connection, Engine.start, target, directory, **arguments)
        control, ring, bank = (Segment.attach(name) for name in (session.control, session.ring, session.bank))
        shared = ControlBlock.attach(control), RingConsumer.attach(ring), WeightBank.attach(bank)
        return cls(None, session, [], *shared, connection, process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _ask(self.connection, function, *args, **kwargs)

    def generate(self, prompts: Sequence[Any], **sampling: Any) -> list[Any]:
        return list(self.run(Engine.generate, prompts, **sampling))

    def call(self, method: str, *args: Any) -> Any:
        return self.run(Engine.call, method, *args)

    def spec_decode_counters(self) -> dict[str, Any]:
        return dict(self.run(Engine.spec_decode_counters))

    def close(self) -> None:
        try:
            self.run(Engine.close)
        finally:
            self.connection.close()
            self.process.kill()  # nothing of it is left but Python's own taking down, which takes seconds
            self.process.wait(timeout=30)


def _ask(connection: Connection, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    connection.send((function, args, kwargs))
    worked, answer = connection.recv()
    if not worked:
        raise RuntimeError(f"in the engine's process:\n{answer}")
    return answer


def serve(connection: Connection) -> None:
    """Do what is asked, with one engine, until nobody asks any more."""
    engine: Engine | None = None
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            if engine is None:
                engine = function(*args, **kwargs)
                answer: Any = engine.session
            else:
                answer = function(engine, *args, **kwargs)
            connection.send((True, answer))
        except Exception:
            connection.send((False, traceback.format_exc()))


def let_steps_overlap() -> None:
    """vLLM's async scheduling on a CPU, where the platform switches it off."""
    from vllm.platforms.cpu import CpuPlatform

    decide = CpuPlatform.check_and_update_config

    def decide_otherwise(config: Any) -> None:
        decide(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(decide_otherwise)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET"):
        from tests.integration.interpreter.repairs import repair

        repair()
    if os.environ.get("TEST_OVERLAPPING_STEPS"):
        let_steps_overlap()
    serve(Connection(int(sys.argv[1])))
