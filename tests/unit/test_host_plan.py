"""Memory of the host beside a vLLM on a CPU."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm import memory_plan, preflight
from aurora_vllm import plan as plans
from aurora_vllm.checkpoint import Draft, Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.config_json import write_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.host_plan import HostPlan
from aurora_vllm.learner.memory import LearnerMemory
from aurora_vllm.plan import ServePlan
from aurora_vllm.spec_decode.model_runner import ModelRunner
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.rows import RowLayout

GIB = 2**30


def planned(target: Target, draft: Draft, **changed: Any) -> ServePlan:
    plan = ServePlan(
        config=AuroraConfig(),
        vllm_version="0",
        model_runner=ModelRunner("V1", ""),
        probes=(),
        target=target,
        draft=draft,
        copied_tokens=0,
        layout=RowLayout(16, 3, torch.float32),
        ring_rows=1,
        ring_bytes=1,
        bank_bytes=1,
        learner=LearnerMemory(1, 0, 0, 0, 0, 0),
    )
    return replace(plan, **changed)


@given(asked=st.floats(0.1, 1.0), ours=st.integers(0, 40 * GIB), total=st.integers(GIB, 64 * GIB))
def test_both_together_take_what_was_asked_for(asked: float, ours: int, total: int) -> None:
    told = HostPlan(total, asked, ours).utilization
    assert asked / 2 <= told <= asked
    if told > asked / 2:
        assert told * total + ours <= asked * total + 1e-8 * total
        assert told * total + ours > (asked - 0.0011) * total  # and no less than can be helped


def test_where_the_cache_has_a_size_nothing_is_lowered() -> None:
    plan = HostPlan(20 * GIB, 0.92, 2 * GIB, kv_cache_given=True)
    assert plan.utilization == 0.92 and plan.why == (
        "2048 MiB must be free beside vLLM, whose KV cache is as large as was said"
    )
    lowered = HostPlan(20 * GIB, 0.92, 2 * GIB)
    assert lowered.why == "2048 MiB for Aurora: --gpu-memory-utilization 0.92 becomes 0.82"
    assert lowered.as_dict()["gpu_memory_utilization"] == {"asked": 0.92, "told": 0.82}


def test_more_than_the_host_has_is_refused() -> None:
    target, draft = Target("t", Path("t"), 16, 8, 100, "float32"), Draft(Path("d"), "given", (2, 4, 5), 64, ())
    plan = planned(target, draft, learner=LearnerMemory(30 * GIB, 0, 0, 0, 0, 0))
    with pytest.raises(AuroraError, match="want 30720 MiB, and the host has 20480; the learner's largest part is"):
        memory_plan.plan_host(plan, Namespace(gpu_memory_utilization=0.9), 20 * GIB)
    without = replace(plan, config=AuroraConfig(learn=False))
    assert memory_plan.plan_host(without, Namespace(gpu_memory_utilization=0.9), 20 * GIB).ours == 2


def test_a_kv_cache_of_a_given_size_has_room_for_the_draft_s_part(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    target = Target("t", tmp_path, 16, 8, 100, "float32", max_model_len=100, kv_width=64)
    spec = TensorSpec("midlayer.self_attn.k_proj.weight", (16, 32), torch.float32)
    plan = planned(target, Draft(Path("d"), "given", (2, 4, 5), 64, (spec,)))
    alone, both = 100 * 4 * 64, 100 * 4 * (64 + 16)
    for fits in None, both, alone - 1:  # the last is vLLM's own to refuse
        preflight.check_kv_cache(plan, Namespace(kv_cache_memory_bytes=fits))
    for too_small in alone, both - 1:
        with pytest.raises(AuroraError, match=f"a request of 100 tokens takes {both} with the draft's part"):
            preflight.check_kv_cache(plan, Namespace(kv_cache_memory_bytes=too_small))
    preflight.check_kv_cache(plan, Namespace(kv_cache_memory_bytes=alone, kv_cache_dtype="fp8"))
    preflight.check_kv_cache(plan, Namespace(kv_cache_memory_bytes=alone, max_model_len=-1))  # vLLM makes it fit
    for forgetful in {"sliding_window": 32}, {"text_config": {"layer_types": ["full_attention", "sliding_attention"]}}:
        write_config(tmp_path, forgetful)
        preflight.check_kv_cache(plan, Namespace(kv_cache_memory_bytes=alone))


@pytest.mark.parametrize(
    ("given", "learns", "told"),
    [
        ({}, True, True),
        ({}, False, True),
        ({"kv_cache_memory_bytes": 5}, True, False),
        ({"environment": "2"}, True, False),
    ],
)
def test_vllm_is_told(given: dict[str, Any], learns: bool, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(memory_plan.CPU_KV_CACHE, raising=False)
    if "environment" in given:
        monkeypatch.setenv(memory_plan.CPU_KV_CACHE, given.pop("environment"))
    target = Target("t", Path("t"), 16, 8, 100, "float32")
    draft = Draft(Path("d"), "given", (1, 2, 3), 64, ())
    args = Namespace(gpu_memory_utilization=0.9, speculative_config=None, kv_cache_memory_bytes=None)
    vars(args).update(given)
    plan = planned(
        target, draft, config=AuroraConfig(learn=learns), learner=LearnerMemory(GIB, 0, 0, 0, 0, 0),
        ring_bytes=GIB, bank_bytes=GIB,
    )  # fmt: skip
    plan = replace(plan, host=memory_plan.plan_host(plan, args, 40 * GIB))
    plans.apply(plan, args)
    assert plan.host is not None and plan.host.ours == (3 if learns else 2) * GIB
    assert args.gpu_memory_utilization == ((0.825 if learns else 0.85) if told else 0.9)


def test_vllm_says_how_much_there_is() -> None:
    total = preflight.host_total_bytes()
    if total is None:
        pytest.skip("vLLM serves from no CPU here")
    assert GIB < total < 2**50
