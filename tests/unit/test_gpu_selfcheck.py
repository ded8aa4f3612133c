"""The GPU's self-check: its arithmetic, its skip, and its pieces with the CPU as the device."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.proc_stat import process_start_time
from aurora_vllm.spec_decode.device_copies import DeviceCopies
from benchmarks import gpu_capture, gpu_copies, gpu_learner, gpu_ring, gpu_timing
from benchmarks import gpu_processes as processes
from benchmarks import gpu_selfcheck as selfcheck


def test_percentiles() -> None:
    samples = [float(i) for i in range(100, 0, -1)]
    assert [gpu_timing.percentile(samples, share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)] == [1, 1, 50, 99, 100]
    assert gpu_timing.percentile([7.0], 0.99) == 7


GOOD: dict[str, Any] = {
    "ring": {"wrong_rows": 0, "rows": 10, "expected_rows": 10},
    "bandwidth": {"ratio": {"128": 0.5, "2048": 0.8}},
    "swap": {"wrong_outputs": 0, "addresses_unchanged": True, "p99_ms": 1.9, "host_waits": False},
    "capture": {"32": {"host_us": 90.0, "device_us": 100.0}},
    "capture_waits": {"host_waits": False},
    "copies": {"wrong_proposals": 0, "wrong_counts": 0, "copied_tokens": 1},
    "copies_cost": {"32": {"3": {"host_us": 300.0, "device_us": 9.0}, "8": {"host_us": 9.0, "device_us": 100.0}}},
    "copies_cost_pinned": {"32": {"3": {"device_us": 9.0}}},
    "copies_wait": {"host_waits": False, "counts_arrive": True},
    "kill": {"a": True, "b": True},
}


@pytest.mark.parametrize(
    ("section", "change", "missed"),
    [
        ("ring", {}, None),
        ("ring", {"wrong_rows": 1}, "ring_integrity"),
        ("ring", {"rows": 9}, "ring_integrity"),
        ("bandwidth", {"ratio": {"128": 0.95, "2048": 0.79}}, "ring_bandwidth"),
        ("bandwidth", {"error": "RuntimeError: no"}, "ring_bandwidth"),
        ("swap", {"wrong_outputs": 1}, "swap_outputs"),
        ("swap", {"addresses_unchanged": False}, "swap_outputs"),
        ("swap", {"p99_ms": 2.0}, "swap_latency"),
        ("swap", {"host_waits": True}, "swap_never_waits"),
        ("capture_waits", {"host_waits": True}, "capture_never_waits"),
        ("capture", {"32": {"host_us": 101.0, "device_us": 1.0}}, "capture_cost"),
        ("copies", {"wrong_proposals": 1}, "copies_right"),
        ("copies", {"wrong_counts": 1}, "copies_right"),
        ("copies", {"copied_tokens": 0}, "copies_right"),
        ("copies_cost", {"32": {"3": {"device_us": 101.0}, "8": {"device_us": 1.0}}}, "copies_cost"),
        ("copies_cost_pinned", {"32": {"3": {"device_us": 101.0}}}, "copies_cost_pinned"),
        ("copies_wait", {"host_waits": True}, "copies_never_wait"),
        ("copies_wait", {"counts_arrive": False}, "copies_never_wait"),
        ("kill", {"b": False}, "kill_recovery"),
    ],
)
def test_verdicts(section: str, change: dict[str, Any], missed: str | None) -> None:
    met = selfcheck.verdicts(GOOD | {section: GOOD[section] | change})
    assert [name for name, good in met.items() if not good] == ([missed] if missed else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_needs_no_vllm(tmp_path: Path) -> None:
    program = (
        "import sys; from benchmarks import gpu_copies, gpu_selfcheck; code = gpu_selfcheck.main(sys.argv[1:]);"
        "gpu_copies.copies_cost('cpu', [1], positions=[1], prompt=8, steps=1);"
        "print([m for m in ('vllm', 'pydantic', 'transformers', 'typer') if m in sys.modules], code, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[] 0"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == json.loads(done.stdout)
    assert written["skipped"] is True
    assert written["why"] == "no CUDA device here"


def test_a_section_that_fails_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits: list[float] = []

    def isolated(limit_s: float, work: Any, device: str, name: str) -> dict[str, Any]:
        assert work is selfcheck.section and device == "cuda:0"
        limits.append(limit_s)
        met = json.loads((tmp_path / "out.json").read_text())["met"] if limits[1:] else {}
        assert len(met) < len(selfcheck.TARGETS)  # a run that is cut leaves what it has
        return {"error": "RuntimeError: CUDA error"} if name == "swap" else dict(GOOD[name])

    monkeypatch.setattr(selfcheck, "sections", lambda device: GOOD)
    monkeypatch.setattr(selfcheck, "ALL_S", 0.0)
    monkeypatch.setattr(processes, "isolated", isolated)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert selfcheck.main(["--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert {name for name, met in found["met"].items() if not met} == {
        "swap_outputs",
        "swap_latency",
        "swap_never_waits",
    }
    assert found["met"].keys() == selfcheck.TARGETS.keys() and limits == [0.0] * len(GOOD)
    assert [line.split(" (")[0] for line in printed.err.splitlines()] == [
        f"{name}: {'RuntimeError: CUDA error' if name == 'swap' else 'done'}" for name in GOOD
    ]


def raise_an_error() -> dict[str, Any]:
    raise RuntimeError("CUDA error:\ninvalid argument")


def die() -> dict[str, Any]:
    os._exit(7)


def leave_a_child() -> dict[str, Any]:
    return {"left": subprocess.Popen(["sleep", "600"]).pid}


def lead_a_child() -> dict[str, Any]:
    process, pipe = processes.start(answer)
    return {"alive": process.is_alive(), "answer": processes.receive(pipe)}


def answer(pipe: Connection) -> None:
    pipe.send(42)


def test_a_section_has_a_process_of_its_own_that_may_start_others() -> None:
    assert processes.isolated(60, lead_a_child) == {"alive": True, "answer": 42}
    assert processes.isolated(60, gpu_capture.capture_waits, "cpu", 16, 9)["rows_written"] > 0


def test_what_becomes_of_a_section_ends_there() -> None:
    assert processes.isolated(60, raise_an_error) == {"error": "RuntimeError: CUDA error: invalid argument"}
    assert processes.isolated(60, die) == {"error": "its process ended with exit code 7"}
    began = time.monotonic()
    assert processes.isolated(0.2, leave_a_child) == {"error": "not done within 0 s"}
    assert time.monotonic() - began < 5


def test_nothing_a_section_started_is_left() -> None:
    left = processes.isolated(60, leave_a_child)["left"]
    deadline = time.monotonic() + 5
    while process_start_time(left) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_start_time(left) is None


def test_every_section_has_its_size_and_every_target_its_section() -> None:
    assert {section for section, _ in selfcheck.TARGETS.values()} <= set(selfcheck.sections("cpu"))


def test_a_process_that_says_nothing_is_not_waited_for() -> None:
    ours, theirs = multiprocessing.Pipe()
    with pytest.raises(TimeoutError, match=r"said nothing for 0\.01 s"):
        processes.receive(ours, 0.01)
    theirs.close()
    with pytest.raises(EOFError, match="the other process ended"):
        processes.receive(ours)


def test_integrity_between_two_processes() -> None:
    found = gpu_ring.ring_integrity("cpu", records=3000, row_bytes=192, capacity=64, batch=7)
    assert (found["rows"], found["wrong_rows"]) == (3000, 0)


def test_a_wrong_row_is_counted() -> None:
    rows = processes.words(torch.empty((5, 192), dtype=torch.uint8), 10).view(torch.uint8)
    assert processes.wrong_rows(rows, 10) == 0
    assert processes.wrong_rows(rows, 11) == 5
    rows[3, 100] ^= 1
    assert processes.wrong_rows(rows, 10) == 1


def test_versions_of_another_process_go_live_in_turn() -> None:
    found = selfcheck.swap_under_a_graph("cpu", selfcheck.head_specs(16, 24, 40, torch.float32), swaps=7)
    assert (found["swaps"], found["wrong_outputs"], found["addresses_unchanged"]) == (7, 0, True)
    assert found["largest_relative_difference"] == 0
    assert found["p99_ms"] >= found["p50_ms"] > 0


def test_a_swap_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "AcceleratorExchange", lambda *tensors: lambda: None)
    found = selfcheck.swap_under_a_graph("cpu", selfcheck.head_specs(16, 24, 40, torch.float32), swaps=4)
    assert found["wrong_outputs"] == 2  # every second time the other version was expected


def test_bandwidth_and_capture_are_of_what_was_written() -> None:
    bandwidth = gpu_ring.ring_bandwidth("cpu", 192, (2, 8), rounds=3)
    assert set(bandwidth["ratio"]) == {"2", "8"}
    assert all(ratio > 0 for ratio in bandwidth["ratio"].values())
    capture = gpu_capture.capture_cost("cpu", 16, (1, 4), steps=3)
    assert {batch: found["rows_written"] for batch, found in capture.items()} == {"1": 8 * 4, "4": 8 * 16}


def test_a_large_step_is_captured_but_for_who_does_not_want_it() -> None:
    found = gpu_capture.capture_waits("cpu", 16, batch=9)
    assert found == {"host_waits": False, "rows_written": 8 * 4 + (1 + 7 * 4) + (1 + 6 * 4)}


def copies() -> dict[str, Any]:
    return gpu_copies.copies_agree("cpu", requests=2, prompt=200, positions=3, steps=48)


def test_copies_are_those_of_the_model() -> None:
    found = copies()
    assert (found["proposals"], found["wrong_proposals"], found["wrong_counts"]) == (96, 0, 0)
    assert 3 * 96 >= found["compared_tokens"] >= found["copied_tokens"] > 96
    assert found["versions"] == [4, 5] and json.dumps(found)


def test_a_copy_that_is_not_the_model_s_and_a_count_too_many_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = DeviceCopies.fetch
    monkeypatch.setattr(DeviceCopies, "fetch", lambda self: [count + 1 for count in fetch(self) or ()])
    monkeypatch.setattr(gpu_copies, "ALL", 0)  # the draft's are proposed
    found = copies()
    assert 0 < found["wrong_proposals"] < 96 and found["wrong_counts"] > 0


def test_what_copies_cost_and_whether_they_wait() -> None:
    found = gpu_copies.copies_cost("cpu", (1, 2), positions=(1, 3), prompt=20, steps=2)
    assert [list(batch) for batch in found.values()] == [["1", "3"]] * 2
    assert all(cost["host_p99_us"] >= cost["host_us"] > 0 for batch in found.values() for cost in batch.values())
    waits = gpu_copies.copies_wait("cpu", batch=3, positions=1, prompt=20)
    assert waits == {"host_waits": False, "counts_arrive": True}


def test_kill_of_either_side() -> None:
    assert all(gpu_ring.kill_recovery("cpu", 192, 16).values())


def test_a_learner_beside_a_load_rests_where_it_has_a_budget() -> None:
    tiny = replace(
        gpu_learner.QWEN3_8B, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, draft_vocab_size=32, target_hidden_size=32,
    )  # fmt: skip
    load = gpu_learner.decode_load("cpu", 16, 3)
    for seconds in (1.5, 5.0, 15.0):  # on a busy machine one step may take longer than the first of these
        found = gpu_learner.learner_beside_a_load("cpu", tiny, 512, load, seconds)
        learners = [found["learner_alone"], *(found[name]["learner"] for name in ("with_budget", "without_budget"))]
        assert all(learner["steps"] >= 1 and learner["rows_per_s"] > 0 for learner in learners)
        if learners[1]["share"] < 0.7 * learners[2]["share"]:  # 0.05 and 1, but for the last step
            break
    else:
        pytest.fail(f"the budget bounds nothing: {learners}")
    assert len(found["load_alone"]) == 2 and found["load_slowdown"].keys() == {"with_budget", "without_budget"}
    for load_figures in (*found["load_alone"], found["with_budget"]["load"]):
        assert load_figures["steps_per_s"] > 0 and load_figures["p99_ms"] >= load_figures["p50_ms"] > 0
