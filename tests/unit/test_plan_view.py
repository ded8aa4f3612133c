"""What a start logs of its plan. How ``--aurora-plan`` shows one: test_plan.py."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from aurora_vllm import plan, plan_view
from aurora_vllm.config import AuroraConfig
from aurora_vllm.spec_decode.compat import Probe
from aurora_vllm.spec_decode.model_runner import ModelRunner
from tests.unit.test_plan import draft_dir, serve_plan, target

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
