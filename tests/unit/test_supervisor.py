"""The learner's keeper: starts it late, restarts it with back-off, ends it, and never leaves it behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_vllm.supervisor import STOP_S, Supervisor, end_process, learner_environment

PYTHON = sys.executable


@pytest.fixture
def keep() -> Iterator[Callable[..., tuple[Supervisor, Any]]]:
    kept = []

    def start(script: str, ready: Callable[[], bool] = lambda: True, **options: Any) -> tuple[Supervisor, Any]:
        block = SimpleNamespace(learner_pid=0, learner_restarts=0)
        supervisor = Supervisor(block, ready, threads=3, nice=7, command=(PYTHON, "-c", script), **options)
        kept.append(supervisor)
        supervisor.start()
        return supervisor, block

    yield start
    for supervisor in kept:
        supervisor.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_starts_before_the_engine_is_up(keep: Any, tmp_path: Path) -> None:
    up: list[int] = []
    _, block = keep(f"open({str(tmp_path / 'ran')!r}, 'w'); import time; time.sleep(60)", ready=lambda: bool(up))
    time.sleep(0.7)
    assert block.learner_pid == 0
    up.append(1)
    wait_for((tmp_path / "ran").exists)
    assert is_alive(block.learner_pid)


def test_restarts_come_later_and_later_and_are_counted(keep: Any, tmp_path: Path, capfd: Any) -> None:
    log = tmp_path / "starts"
    keep(
        f"import time; open({str(log)!r}, 'a').write(f'{{time.monotonic()}}\\n'); raise SystemExit(7)", waits=(0.2, 0.8)
    )
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 5)
    starts = [float(line) for line in log.read_text().splitlines()]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    for gap, least in zip(gaps, (0.2, 0.4, 0.8, 0.8), strict=False):
        assert gap >= least
    assert "the learner exited with code 7 after" in capfd.readouterr().err


def test_a_long_life_starts_the_waits_over(keep: Any) -> None:
    _, block = keep("pass", waits=(0.05, 60.0), stable_s=0.0)
    wait_for(lambda: block.learner_restarts >= 6)  # doubling, the sixth would come after 1.5 s of waits; and 60 s at 12


def test_stop_ends_a_learner_that_does_not_listen(keep: Any, tmp_path: Path) -> None:
    ready = tmp_path / "deaf"
    script = (
        f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);open({str(ready)!r}, 'w'); time.sleep(60)"
    )
    supervisor, block = keep(script, stop_s=0.5)
    wait_for(ready.exists)
    pid, started = block.learner_pid, time.monotonic()
    supervisor.stop()
    assert 0.5 <= time.monotonic() - started < STOP_S  # as long as it was given, not as long as it is by default
    assert not is_alive(pid)
    assert not supervisor.is_alive()
    assert (block.learner_pid, block.learner_restarts) == (0, 0)


def test_stop_gives_a_learner_the_time_to_save(keep: Any, tmp_path: Path) -> None:
    saved, up = tmp_path / "saved", tmp_path / "up"
    script = (
        "import signal, sys, time\n"
        f"def end(*_): time.sleep(0.5); open({str(saved)!r}, 'w'); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, end); open({str(up)!r}, 'w')\n"
        "while True: time.sleep(0.1)"  # a signal just before one long sleep would be handled after it
    )
    supervisor, _ = keep(script, stop_s=20.0)
    wait_for(up.exists)
    started = time.monotonic()
    supervisor.stop()
    assert saved.exists() and time.monotonic() - started < 15  # no longer than it took


def test_a_learner_that_hangs_is_ended_and_another_one_started(keep: Any, tmp_path: Path, capfd: Any) -> None:
    log, began = tmp_path / "starts", time.monotonic()
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"{deaf}; open({str(log)!r}, 'a').close(); time.sleep(60)"

    def heartbeat() -> int:  # for the first two seconds
        return min(int(10 * (time.monotonic() - began)), 20)

    _, block = keep(script, waits=(0.1, 0.1), heartbeat=heartbeat, hang_s=0.5)
    wait_for(log.exists)
    first = block.learner_pid
    wait_for(lambda: block.learner_pid not in (0, first))
    assert time.monotonic() - began > 2.5  # not while its heart beat
    assert not is_alive(first)
    assert block.learner_restarts == 1
    assert "the learner showed no sign of life and was ended" in capfd.readouterr().err


def test_one_that_runs_in_a_circle_is_ended_too(keep: Any) -> None:
    _, block = keep("while True: pass", waits=(0.1, 0.1), hang_s=60.0, hang_cpu_s=0.5)
    wait_for(lambda: block.learner_restarts)


def test_one_that_works_for_long_is_left_alone(keep: Any, tmp_path: Path) -> None:
    """Beside a full load a piece of work may take long; it shows by the CPU time it gets."""
    beats, up = itertools.count(), tmp_path / "up"
    _, block = keep("import time; time.sleep(60)", heartbeat=lambda: next(beats) // 2, hang_s=0.5)
    _, other = keep(f"open({str(up)!r}, 'w')\nwhile True: pass", hang_s=0.5)
    wait_for(up.exists)
    time.sleep(1.5)
    assert (block.learner_restarts, other.learner_restarts) == (0, 0)


def test_stop_during_a_wait_is_quick(keep: Any) -> None:
    supervisor, block = keep("raise SystemExit(1)", waits=(60.0, 60.0))
    wait_for(lambda: block.learner_restarts == 1)
    started = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - started < 1


def test_stop_before_start_is_allowed() -> None:
    block = SimpleNamespace(learner_pid=0, learner_restarts=0)
    Supervisor(block, lambda: True, threads=1, nice=10, command=("false",)).stop()


def test_the_learner_steps_back_behind_the_server(keep: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, time;"
        "line = f\"{os.nice(0)} {os.environ['OMP_NUM_THREADS']}\";"
        f"open({str(out)!r}, 'w').write(line); time.sleep(60)"
    )
    _, block = keep(script)
    wait_for(lambda: out.exists() and out.read_text())
    assert out.read_text() == f"{min(os.nice(0) + 7, 19)} 3"
    assert os.getpgid(block.learner_pid) != os.getpgid(0)  # Ctrl-C in the terminal does not reach it
    assert os.getsid(block.learner_pid) == os.getsid(0)  # niceness counts within a session (autogroup)


def test_the_learner_dies_with_a_server_that_was_killed(tmp_path: Path) -> None:
    server = f"""
import time
from types import SimpleNamespace
from aurora_vllm.supervisor import Supervisor
block = SimpleNamespace(learner_pid=0, learner_restarts=0)
command = ({PYTHON!r}, "-c", "import time; print('up', flush=True); time.sleep(60)")
Supervisor(block, lambda: True, 1, 10, command).start()
while not block.learner_pid: time.sleep(0.01)
print(block.learner_pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([PYTHON, "-c", server], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, up = (process.stdout.readline().strip() for _ in range(2))
        assert up == "up"
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not is_alive(int(pid)), 5)


def test_a_learner_whose_server_is_gone_already_never_starts() -> None:
    """Nobody is left who would end it: the kernel's signal comes for a parent that dies later."""
    nobody = str(2**22 + 1)  # above the largest pid there is
    command = [PYTHON, "-m", "aurora_vllm.supervisor", nobody, "0", PYTHON, "-c", "print('it learns')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")


def test_threads_are_the_learners_own() -> None:
    environment = learner_environment({"OMP_NUM_THREADS": "8", "HOME": "/h"}, 2)
    assert environment == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
    }


def test_a_log_that_nobody_reads_any_more_stops_no_restart(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
    _, block = keep("raise SystemExit(1)", waits=(0.05, 0.05))
    wait_for(lambda: block.learner_restarts >= 3)


def test_a_learner_that_nothing_can_end_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a dead disk, in state D: SIGKILL is for later."""
    asked: list[str] = []

    def wait(timeout: float | None = None) -> int:
        assert timeout is not None
        asked.append("wait")
        raise subprocess.TimeoutExpired("learner", timeout)

    process = SimpleNamespace(terminate=lambda: asked.append("term"), kill=lambda: asked.append("kill"), wait=wait)
    end_process(process, 0.01)  # type: ignore[arg-type]
    assert asked == ["term", "wait", "kill", "wait"]


def test_where_memory_runs_out_the_learner_goes_first(keep: Any, tmp_path: Path) -> None:
    out = tmp_path / "score"
    keep(f"open({str(out)!r}, 'w').write(open('/proc/self/oom_score_adj').read()); import time; time.sleep(60)")
    wait_for(lambda: out.exists() and out.read_text())
    assert int(out.read_text()) == 1000
