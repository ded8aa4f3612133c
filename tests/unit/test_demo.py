"""The demo's machinery without a model: figures, blocks, processes, pictures."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from demo import figures, fleet, leftovers, model, servers
from demo.client import Answer, Block, drive
from demo.plot import plot
from demo.view import line, panel
from demo.watch import Point, Progress, Sample
from demo.workload import Prompt

SAMPLE = Sample(
    requests=0, live_version=1, draft_length=0, swaps=0, shadow_length=None, drafts=0, draft_tokens=0, accepted=0
)
STATUS = {
    "versions": {
        "live": 2,
        "acceptance": [
            {
                "version": 2,
                "num_drafts": 10,
                "num_draft_tokens": 30,
                "num_accepted": 5,
                "mean_acceptance_length": 1.5,
            }
        ],
        "total": {"num_drafts": 10, "num_draft_tokens": 30, "num_accepted": 5},
    },
    "speculation": {
        "draft_length": 3,
        "reason": "drafting pays",
        "copied_drafts": 4,
        "copied_tokens": 12,
        "copied_accepted": 9,
    },
    "swaps": {"swaps": 4, "refusals": 0},
    "capture": {"requests_dropped": 0},
    "ring": {"used_share": 0.25, "capacity": 100},
    "learner": {
        "state": "training",
        "message": "",
        "step": 7,
        "tokens_trained": 99,
        "shadow_version": 2,
        "shadow_steps": 50,
        "shadow_accepted_per_position": [0.4, 0.2, 0.1],
        "pid": 0,
    },
}


def block(arm: str, tokens: list[int], seconds: float, text: str = "") -> Block:
    answers = [Answer(Prompt(f"p{i}", "?"), 0.0, count, text) for i, count in enumerate(tokens)]
    return Block(arm, 1, answers, seconds)


def test_ratio_is_of_rates_and_the_figure_is_the_median() -> None:
    pairs = [figures.Pair(block("plain", [10, 10], 2.0), block("aurora", [10, 10], s)) for s in (1.0, 2.0, 4.0)]
    values, spread = figures.rate_figures("speedup_c1", pairs)
    assert values["speedup_c1"] == 1.0
    assert values["speedup_c1_plain_tokens_per_s"] == 10.0
    assert spread["speedup_c1"] == {"min": 0.5, "max": 2.0, "blocks": [2.0, 1.0, 0.5]}
    assert figures.overall_ratio(pairs) == pytest.approx((60 / 7) / (60 / 6))


def test_changed_answers_are_counted_per_prompt() -> None:
    pair = figures.Pair(block("plain", [1, 1], 1.0, "a"), block("aurora", [1, 1], 1.0, "a"))
    assert pair.changed == 0
    pair.aurora.answers[1] = replace(pair.aurora.answers[1], text="b")
    assert pair.changed == 1


def test_acceptance_is_live_only_where_the_full_draft_length_ran() -> None:
    full = [replace(SAMPLE, requests=i, drafts=100 * i, draft_tokens=300 * i, accepted=80 * i) for i in range(5)]
    assert figures.acceptance(full, 0, 1, 3) == figures.Acceptance(pytest.approx(1.8), "live")
    shorter = [replace(s, draft_tokens=2 * s.drafts, shadow_length=1.6) for s in full]
    assert figures.acceptance(shorter, 0, 1, 3) == figures.Acceptance(pytest.approx(1.6), "shadow")
    assert figures.acceptance([replace(s, shadow_length=None) for s in shorter], 0, 1, 3) is None
    copying = [replace(s, copied_accepted=i, shadow_length=1.6) for i, s in enumerate(full)]
    assert figures.acceptance(copying, 0, 1, 3) == figures.Acceptance(pytest.approx(1.6), "shadow")
    assert figures.acceptance([], 0, 1, 3) is None


def test_acceptance_takes_its_quarter_of_the_requests() -> None:
    samples = [replace(SAMPLE, requests=i, shadow_length=1.0 + i / 100) for i in range(101)]
    first, last = figures.acceptance(samples, 0, 0.25, 3), figures.acceptance(samples, 0.75, 1, 3)
    assert first is not None and first.length == pytest.approx(1.125)
    assert last is not None and last.length == pytest.approx(1.875)


def test_pauses_between_blocks_do_not_count_as_slowness() -> None:
    progress = Progress(phase="learning")
    for _ in range(2):
        progress.block_begins("aurora")
        for i in range(1, 4):
            progress.answered("aurora", Answer(Prompt("p", "?"), float(i), 50, ""))
    assert progress.rates["aurora"] == pytest.approx(50.0)
    assert [point.requests for point in progress.points] == [1, 2, 3, 4, 5, 6]


def test_a_sample_is_read_from_a_status() -> None:
    sample = Sample.of(STATUS, 12)
    assert (sample.requests, sample.live_version, sample.swaps, sample.drafts) == (12, 2, 4, 14)
    assert (sample.draft_tokens, sample.accepted, sample.copied_drafts, sample.copied_accepted) == (42, 14, 4, 9)
    assert sample.shadow_length == pytest.approx(1.7)


@pytest.fixture
def completions() -> Iterator[tuple[str, list[int]]]:
    """A server that answers slowly, and how many requests it had at once."""
    at_once: list[int] = []
    now = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                now += 1
                at_once.append(now)
            time.sleep(0.05)
            with lock:
                now -= 1
            reply = json.dumps(
                {"choices": [{"message": {"content": "hi"}}], "usage": {"completion_tokens": 3}}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", at_once
    server.shutdown()
    server.server_close()


def test_a_block_keeps_its_concurrency(completions: tuple[str, list[int]]) -> None:
    url, at_once = completions
    prompts = [Prompt(f"p{i}", "?") for i in range(9)]
    seen: list[Answer] = []
    done = asyncio.run(drive("plain", url, "m", prompts, 3, 8, seen.append))
    assert max(at_once) == 3
    assert done.tokens == 27
    assert done.seconds >= 0.15
    assert sorted(answer.prompt.problem for answer in seen) == [f"p{i}" for i in range(9)]


def test_a_block_ends_at_its_time(completions: tuple[str, list[int]]) -> None:
    endless = (Prompt(f"p{i}", "?") for i in range(10**9))
    done = asyncio.run(drive("plain", completions[0], "m", endless, 2, 8, until=time.monotonic() + 0.2))
    assert 2 <= len(done.answers) <= 20


def test_paused_stops_a_process_and_lets_it_go_on() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            process = psutil.Process(child.pid)
            with servers.paused(child.pid):
                assert _becomes(process, psutil.STATUS_STOPPED)
            assert _becomes(process, psutil.STATUS_SLEEPING)
        finally:
            child.kill()
    with servers.paused(0), servers.paused(child.pid):  # nobody, and somebody who is gone
        pass


def _becomes(process: psutil.Process, status: str) -> bool:
    for _ in range(200):
        if process.status() == status:
            return True
        time.sleep(0.02)
    return False


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = servers.Server("plain", ["--aurora-no-such-flag"], tmp_path / "log", {})
    with pytest.raises(servers.ServerFailed, match="ended with code 2"):
        servers.wait_up([server], 120, lambda waited: None)
    server.stop()


def test_to_ask_a_server_takes_next_to_no_time_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once a second while it is measured."""
    script = (
        "import sys; from http.server import *\n"
        "class Handler(BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'{\"a\": 1}')\n"
        "ThreadingHTTPServer(('127.0.0.1', int(sys.argv[-1])), Handler).serve_forever()\n"
    )
    monkeypatch.setattr(servers, "PROGRAM", (sys.executable, "-c", script))
    server = servers.Server("plain", [], tmp_path / "log", {})
    try:
        servers.wait_up([server], 60, lambda waited: None)
        assert server.status() == {"a": 1}
        began = time.thread_time()
        for _ in range(10):
            server.status()
        assert time.thread_time() - began < 10 * 0.015  # 0.045 with a client for each
    finally:
        server.stop()


def test_ending_a_server_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import signal, subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN);"
        " time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(servers, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(servers, "STOP_S", 1.0)
    server = servers.Server("plain", [], tmp_path / "log", {})
    marker = tmp_path / "child"
    while not (marker.exists() and marker.read_text()):
        time.sleep(0.02)
    os.kill(server.pid, signal.SIGSTOP)  # even one that was paused
    server.stop()
    assert not psutil.pid_exists(server.pid)
    assert not psutil.pid_exists(int(marker.read_text()))


def test_a_server_ends_with_a_demo_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from demo import servers\n"
        "servers.PROGRAM = sys.executable, '-c', 'import time; time.sleep(600)'\n"
        "print(servers.Server('plain', [], Path(sys.argv[1]), {}).pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        server = psutil.Process(int(demo.stdout.readline()))
        demo.kill()
    _, alive = psutil.wait_procs([server], timeout=30)
    assert not alive


def test_a_fleet_ends_its_servers_one_or_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(600)"))
    some = fleet.Fleet({}, tmp_path)
    for name in ("a", "b", "c"):
        some.start(name, [])
    pids = {name: some[name].pid for name in ("a", "b", "c")}
    with some.learner_paused("a"), some.learner_paused("nobody"):  # neither has a learner
        pass
    some.stop(["b"])
    assert "b" not in some and not psutil.pid_exists(pids["b"])
    assert psutil.pid_exists(pids["a"])
    some.close()
    some.close()
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


def test_shared_memory_is_removed_only_when_nobody_maps_it() -> None:
    before = leftovers.names()
    held = shared_memory.SharedMemory(create=True, size=64)
    name = held.name.lstrip("/")
    try:
        assert name not in leftovers.remove(before)
        assert name not in leftovers.remove(leftovers.names())
        held.close()
        assert name not in leftovers.remove(leftovers.names())  # it was there before
        assert name in leftovers.remove(before)
        assert not (leftovers.SHM / name).exists()
    finally:
        held.close()
        resource_tracker.unregister(held._name, "shared_memory")  # type: ignore[attr-defined]


def test_a_semaphore_that_only_its_maker_maps_stays() -> None:
    """As between the making of vLLM's worker and its first line: without the semaphore it would not start."""
    before = leftovers.names()
    semaphore = multiprocessing.get_context("spawn").Semaphore()  # its name goes with it
    made = leftovers.names() - before
    assert made
    assert not made.intersection(leftovers.remove(before))
    del semaphore


def test_a_note_of_openmp_is_removed_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "SHM", tmp_path)  # in /dev/shm lie the notes of other tests' processes as well
    before = leftovers.names()
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass  # it has ended
    notes = [leftovers.SHM / f"__KMP_REGISTERED_LIB_{pid}_999" for pid in (os.getpid(), child.pid)]
    try:
        for note in notes:
            note.touch()
        assert leftovers.remove(before) == [notes[1].name]
    finally:
        for note in notes:
            note.unlink(missing_ok=True)


def test_the_view_renders_what_there_is() -> None:
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    empty, full = Progress(), Progress(phase="learning", status=STATUS)
    full.block_begins("aurora")
    full.answered("aurora", Answer(Prompt("p", "?"), 2.0, 96, ""))
    for progress in (empty, full):
        console.print(panel(progress, time.monotonic() + 65))
    text = console.export_text()
    assert "K=3: drafting pays" in text and "1.70 of v2" in text and "48.0" in text
    assert "learning | aurora 1 requests, 48.0 tok/s | draft v2, 4 swaps" in line(full, time.monotonic() + 65)


def test_the_plot_is_drawn_with_and_without_data(tmp_path: Path) -> None:
    samples = [replace(SAMPLE, requests=i, swaps=i // 10, shadow_length=1 + i / 100) for i in range(50)]
    points = [Point(i, 40.0 + i) for i in range(50)]
    rates = {f"speedup_c1_{arm}_tokens_per_s": 10.0 for arm in ("plain", "aurora")}
    plot(
        tmp_path / "full.png", samples, points, {"speedup_c1": 1.0, "day0_ratio_plain_tokens_per_s": 45.0, **rates}, 20
    )
    plot(tmp_path / "empty.png", [], [], {}, 20)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("full.png", "empty.png"))


def test_a_model_that_failed_to_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(scratch: Path, console: Console) -> None:
        (scratch / "model").mkdir()
        (scratch / "model" / "config.json").write_text("{}")
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr(model, "_build", half)
    with pytest.raises(RuntimeError):
        model.ensure_model(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]

    def whole(scratch: Path, console: Console) -> None:
        (scratch / "model").mkdir()
        (scratch / "model" / "recipe.json").write_text(json.dumps({"recipe": model.RECIPE}))

    (tmp_path / ".m.killed.tmp").mkdir()  # of a build that had no chance to tidy up
    monkeypatch.setattr(model, "_build", whole)
    assert model.is_ready(model.ensure_model(tmp_path / "m"))
    monkeypatch.setattr(model, "_build", half)
    model.ensure_model(tmp_path / "m")  # only looks
    assert not (tmp_path / ".m.killed.tmp").exists()
