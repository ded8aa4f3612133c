"""What ``--aurora-plan`` shows of a plan, and what the log of a start says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aurora_vllm import plan, plan_view
from aurora_vllm.config import AuroraConfig
from aurora_vllm.interop import aurora_yaml
from aurora_vllm.spec_decode.compat import Probe
from aurora_vllm.spec_decode.model_runner import ModelRunner
from tests.unit.plan_world import draft_dir, serve_plan, target

__all__ = ["draft_dir", "serve_plan", "target"]  # fixtures


def test_a_start_in_one_line(serve_plan: plan.ServePlan) -> None:
    on_gpu: Any = SimpleNamespace(used=True, why="8192 MiB for Aurora: --gpu-memory-utilization 0.9 becomes 0.8")
    on_cpu: Any = SimpleNamespace(why="1024 MiB for Aurora: --gpu-memory-utilization 0.9 becomes 0.85")
    made = replace(
        serve_plan,
        model_runner=ModelRunner("V1", "a test said so"),
        draft=replace(serve_plan.draft, origin="day-0, to be made"),
        host=on_cpu,
    )
    assert plan_view.in_one_line(made) == (
        f"aurora_vllm {version('aurora-vllm')} on vLLM 0.32.0, model runner V1; day-0 draft {made.draft.directory}; "
        "K up to 3, up to 8 copied tokens, auto; learner on at most 5% of a CPU; "
        "1024 MiB for Aurora: --gpu-memory-utilization 0.9 becomes 0.85"
    )
    said = plan_view.in_one_line(replace(made, gpu=on_gpu, host=None))
    assert said.endswith(f"; learner on the GPU with at most 5% of it; {on_gpu.why}")
    plain = replace(made, config=AuroraConfig(learn=False, speculate="never"), copied_tokens=0)
    assert "; K up to 3, no copied tokens, never; no learner; 1024 MiB" in plan_view.in_one_line(plain)


def test_a_vllm_that_the_tests_have_not_run_is_warned_of(serve_plan: plan.ServePlan) -> None:
    assert plan_view.untested(serve_plan) == ""
    probes = (*serve_plan.probes, Probe("c:d", True, "fits, but this version was never tested", tested=False))
    assert plan_view.untested(replace(serve_plan, probes=probes)) == (
        "vLLM 0.32.0: 1 of 2 wrapped parts are not the tested ones (c:d fits, but this version was never tested); "
        "aurora-vllm check-vllm compares all of them"
    )


def test_the_runner_is_shown(serve_plan: plan.ServePlan, capsys: Any) -> None:
    plan_view.show(serve_plan, "text")
    assert "model runner    V1 (no Triton for this device)\n" in capsys.readouterr().out
    assert plan_view.as_dict(serve_plan)["model_runner"] == {"name": "V1", "reason": "no Triton for this device"}


def test_shown_as_json(serve_plan: plan.ServePlan, capsys: Any) -> None:
    plan_view.show(serve_plan, "json")
    shown = json.loads(capsys.readouterr().out)
    assert shown == plan_view.as_dict(serve_plan)
    assert shown["memory"]["bank_bytes"] == serve_plan.bank_bytes
    assert shown["serves"] == "aurora"
    assert AuroraConfig(**shown["settings"]) == serve_plan.config


def test_settings_that_somebody_made_are_shown(serve_plan: plan.ServePlan, capsys: Any) -> None:
    for settings, line in ({}, "all defaults"), ({"ring_mb": 3, "learn": False}, "ring_mb=3 learn=False"):
        plan_view.show(replace(serve_plan, config=AuroraConfig(**settings)), "text")
        assert f"settings        {line}\n" in capsys.readouterr().out


def test_the_drafts_part_of_the_kv_cache(serve_plan: plan.ServePlan, capsys: Any) -> None:
    """One head of 8 channels keeps 8 keys and 8 values, float32; the target's eight layers keep as much each."""
    known = replace(serve_plan, target=replace(serve_plan.target, kv_width=8 * 16))
    assert plan_view.as_dict(known)["memory"]["kv_bytes_per_token"] == {"draft": 64, "target": 512}
    plan_view.show(known, "text")
    assert (
        "KV cache        0.1 KiB a token for the draft beside the target's 0.5 (11% of all)" in capsys.readouterr().out
    )
    plan_view.show(serve_plan, "text")  # a target whose layers do not all have one
    assert "KV cache        0.1 KiB a token for the draft\n" in capsys.readouterr().out


def test_every_key_of_an_aurora_file_is_shown(serve_plan: plan.ServePlan, tmp_path: Path, capsys: Any) -> None:
    content = {"training": {"seed": 3}, "decode": {"top_p": 0.9}}
    shown = replace(serve_plan, aurora_file=aurora_yaml.read(content, tmp_path / "a.yaml"))
    plan_view.show(shown, "text")
    out = capsys.readouterr().out
    assert f"Aurora's file   {tmp_path / 'a.yaml'}" in out
    assert "ok   training.seed: seed = 3" in out
    assert "NOT  decode.top_p: nothing is generated for training" in out
    keys = json.loads(json.dumps(plan_view.as_dict(shown)))["aurora_file"]["keys"]
    assert [(one["key"], one["honoured"]) for one in keys] == [("training.seed", True), ("decode.top_p", False)]


def test_shown_as_text(serve_plan: plan.ServePlan, capsys: Any, monkeypatch: Any) -> None:
    misfit = replace(serve_plan, probes=(*serve_plan.probes, Probe("c:d", False, "not in this vLLM")))
    plan_view.show(misfit, "text")
    out = capsys.readouterr().out
    for word in (
        "owner/target",
        "2, 4, 5",
        "0.32.0",
        "1 of 2 fit: serves plain vLLM",
        "c:d: not in this vLLM",
        "K up to 3",
    ):
        assert word in out
    assert plan_view.as_dict(misfit)["serves"] == "plain vLLM"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    plan_view.show(serve_plan, "text")
    assert "aurora_vllm would run" in capsys.readouterr().out
