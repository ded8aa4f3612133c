"""A first Ctrl-C or SIGTERM always ends the server, whatever state vLLM is in."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PRELUDE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
from aurora_vllm import stopping
from aurora_vllm.stopping import StopGuard, end_descendants
stopping.GRACE_S = 1.0
guard = StopGuard()
guard.grace_s = 1.0
def say(*words): print(*words, flush=True)
"""


def run(script: str, *numbers: int, between: float = 0.2) -> tuple[int, str, str, float]:
    """Run a script until it says "ready", send it the signals; exit code, stdout, stderr, seconds it then took."""
    command = [sys.executable, "-c", PRELUDE + script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(between)
        try:
            process.wait(20)
        finally:
            process.kill()
        return process.returncode, process.stdout.read(), process.stderr.read(), time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_interrupts(number: signal.Signals) -> None:
    script = """
try:
    say("ready"); time.sleep(20)
except KeyboardInterrupt:
    say("interrupted"); guard.leave(guard.exit_code)
"""
    code, out, error, _ = run(script, number)
    assert (code, out, error) == (128 + number, "interrupted\n", "")


def test_a_lost_interrupt_is_made_good() -> None:
    # As pyzmq's poll does with a KeyboardInterrupt from vLLM's handler.
    script = """
import subprocess
def lost(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, lost)
stubborn = "import time, signal; signal.signal(15, signal.SIG_IGN); time.sleep(30)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
stopping.cleanups.append(lambda: say(child.pid, "cleaned up"))
try:
    say("ready"); time.sleep(20)
except KeyboardInterrupt:
    time.sleep(20)
"""
    code, out, error, took = run(script, signal.SIGTERM)
    child, cleaned = out.strip().split(maxsplit=1)
    assert code == 143
    assert cleaned == "cleaned up"
    stat = Path(f"/proc/{child}/stat")  # init may take its time to reap it
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert "still here 1 s after SIGTERM" in error
    assert took < 10


def test_what_is_to_stop_at_once_does_beside_vllms_own_way_out() -> None:
    script = """
stopping.at_once.append(lambda: say("stopped"))
stopping.at_once.append(lambda: 1 / 0)
stopping.cleanups.append(lambda: say("cleaned up"))
try:
    say("ready"); time.sleep(20)
except KeyboardInterrupt:
    time.sleep(20)
"""
    code, out, _error, took = run(script, signal.SIGTERM)
    assert (code, out) == (143, "stopped\ncleaned up\n") and took < 10  # the clock ran on


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    script = """
try:
    say("ready"); time.sleep(20)
except KeyboardInterrupt:
    time.sleep(0.7); say("cleaned up"); guard.leave(3)
"""
    assert run(script, signal.SIGINT, signal.SIGINT, signal.SIGTERM)[:3] == (3, "cleaned up\n", "")


def test_an_event_loops_handler_is_called_and_noted() -> None:
    script = """
import asyncio
async def serve():
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (say("stop"), stop.set()))
    say("ready"); await stop.wait(); await asyncio.sleep(0.5)
asyncio.run(serve()); say(guard.number); guard.leave(0)
"""
    assert run(script, signal.SIGTERM)[:3] == (0, "stop\n15\n", "")


def test_a_handler_that_was_saved_and_put_back_still_works() -> None:
    script = """
before = signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGINT, before)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
try:
    say("ready"); time.sleep(20)
except KeyboardInterrupt:
    say(guard.number); guard.leave(0)
"""
    assert run(script, signal.SIGINT)[1] == "2\n"
    assert run(script, signal.SIGTERM)[1] == "15\n"


def test_leave_runs_what_was_registered_and_returns_without_a_signal() -> None:
    script = """
import atexit
atexit.register(say, "at exit")
say("ready")
guard.leave(5); say("still here")
"""
    assert run(script)[:2] == (0, "still here\nat exit\n")


def test_grandchildren_end_too() -> None:
    script = """
import subprocess
code = "import subprocess, sys; p = subprocess.Popen(['sleep', '30']); print(p.pid, flush=True); p.wait()"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
grandchild = int(child.stdout.readline())
end_descendants(); child.wait()
say("ready"); say(stopping.is_alive(grandchild))  # gone, or waiting for init to reap it
"""
    assert run(script)[1] == "False\n"


def test_processes_get_the_time_to_end_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, time\n"
        "def end(*_):\n"
        "    time.sleep(0.4); pathlib.Path(__file__).with_name('ended').touch(); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(30)\n"
    )
    script = f"""
import subprocess
child = subprocess.Popen([sys.executable, {str(tmp_path / "slow.py")!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
end_descendants(patience_s=10); child.wait()
say("ready")
"""
    assert run(script)[3] < 10
    assert (tmp_path / "ended").exists()


def test_the_clock_runs_whatever_stopping_waits_for_and_whoever_reads_the_log() -> None:
    script = """
import threading
def lost(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, lost)
stopping.at_once.append(threading.Event().wait)
read, write = os.pipe(); os.close(read); os.dup2(write, 2)
while True:
    try: say("ready") if not guard.number else None; time.sleep(20)
    except KeyboardInterrupt: pass
"""
    code, _, _, seconds = run(script, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and seconds < 5
