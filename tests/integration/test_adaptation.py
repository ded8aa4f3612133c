"""The adaptation benchmark as one runs it, at its smallest: two servers, vLLM's client, a report that adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from aurora_vllm.transport.segment import owner_is_alive
from demo import leftovers
from tests.integration.paths import python_path


def test_the_smoke_run_measures_and_its_figures_add_up(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "adaptation.json"
    before, segments = leftovers.names(), set(leftovers.SHM.glob("aurora-*"))
    environment = {k: v for k, v in os.environ.items() if k not in ("AURORA_SESSION", "VLLM_ENABLE_V1_MULTIPROCESSING")}
    environment |= {"AURORA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.adaptation", "--smoke", "--json", str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["complete"]
    windows = report["windows"]
    assert [(w["arm"], w["part"], w["concurrency"]) for w in windows] == [
        ("plain", "learn", 4), ("aurora", "learn", 4), ("aurora", "measure", 1), ("plain", "measure", 1),
        ("plain", "measure", 4), ("aurora", "measure", 4),
    ]  # fmt: skip
    for window in windows:
        assert (window["requests"], window["failed"]) == (4, 0)
        assert 4 <= window["tokens"] <= 4 * 8
        assert 0 < window["ttft_ms"]["p50"] <= window["ttft_ms"]["p99"] < 1000 * window["seconds"]
        assert 0 < window["tpot_ms"]["p50"] < 1000 * window["seconds"]
        assert bool(window["learner"]) == (window["arm"] == "aurora")

    # The figures once more, from what was recorded, without the benchmark's own arithmetic.
    rates: dict[tuple[int, str], float] = {(w["slot"], w["arm"]): w["tokens"] / w["seconds"] for w in windows}
    ratios = [rates[i, "aurora"] / rates[i, "plain"] for i in range(3)]
    over_plain = [
        sum(w["tokens"] for w in windows if w["arm"] == arm) / sum(w["seconds"] for w in windows if w["arm"] == arm)
        for arm in ("aurora", "plain")
    ]
    expected = {"worst_window_ratio": min(ratios), "day0_speedup_c1": ratios[1], "day0_speedup_c4": ratios[2]}
    expected["over_plain"] = over_plain[0] / over_plain[1]
    assert set(report["figures"]) == set(expected)
    assert all(abs(report["figures"][name] - value) < 1e-9 for name, value in expected.items())

    assert (tmp_path / "adaptation.png").exists() and (tmp_path / "adaptation_speedups.png").exists()
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path) in command for command in commands)
    assert not leftovers.remove(before)
    left = set(leftovers.SHM.glob("aurora-*")) - segments
    assert all(owner_is_alive(path.name) for path in left)  # other tests' servers may be running
