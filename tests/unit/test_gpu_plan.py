"""What is taken on a GPU and what vLLM is told, as arithmetic; no GPU has compared it with anything."""

from __future__ import annotations

import fcntl
import gc
import json
import os
from argparse import Namespace
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm import memory_plan, plan, plan_view, preflight
from aurora_vllm.checkpoint import target_head_bytes
from aurora_vllm.config import AuroraConfig
from aurora_vllm.gpu_plan import GpuPlan
from aurora_vllm.learner.memory import CONTEXT_BYTES, MIB, DraftSizes, GpuMemory, predict, predict_gpu
from aurora_vllm.runtime import Runtime
from aurora_vllm.session import ENVIRONMENT_KEY
from aurora_vllm.transport.bank import weights_bytes
from aurora_vllm.transport.control import ControlBlock, WorkerBlock
from aurora_vllm.transport.ring import HEADER_BYTES
from aurora_vllm.transport.segment import SHM, Segment
from tests.unit.plan_world import V2, draft_dir, serve_plan, target

__all__ = ["draft_dir", "serve_plan", "target"]  # fixtures
GIB = 2**30
# An EAGLE-3 head for Qwen3-8B: hidden 4096, 32 query and 8 key heads of 128, MLP 12288, 32k of vocabulary.
SIZES = DraftSizes(400_000_000, 4096, 4096, 1024, 12288, 32000, 3 * 4096, 4096)


def gpu(total: int = 80 * GIB, asked: float = 0.9, takes: int = 8 * GIB, **rest: Any) -> GpuPlan:
    return GpuPlan(total, asked, GpuMemory(takes, *[0] * (len(fields(GpuMemory)) - 1)), **rest)


def test_every_term_counts_what_it_names() -> None:
    def of(draft: DraftSizes = SIZES, rows: int = 2048, ring: int = 256 * MIB) -> dict[str, int]:
        return asdict(predict_gpu(draft, 100, rows, 3, ring, 2400 * MIB))

    base = of()
    assert base["target"] == 100 and base["context"] == CONTEXT_BYTES
    assert base["ring"] == 256 * MIB and base["bank"] == base["swap"] == 2400 * MIB
    assert of(ring=256 * MIB - 1)["ring"] == 256 * MIB and of(ring=254 * MIB + 1)["ring"] == 256 * MIB  # 2 MiB each
    assert base["copies"] == 0 and predict_gpu(SIZES, 100, 2048, 3, MIB, MIB, copies_bytes=77).copies == 77
    assert base["logits"] == 0 and predict_gpu(SIZES, 100, 2048, 3, MIB, MIB, logits_bytes=78).logits == 78
    on_host = [predict(SIZES, 100, 0, 2048, 3, bfloat16) for bfloat16 in (False, True)]
    assert base["weights"] == on_host[0].weights and base["rows"] == on_host[0].rows
    assert base["step"] == max(one.step for one in on_host)  # a target this wide has no lesson there either
    assert predict_gpu(SIZES, 100, 2048, 3, 256 * MIB, 2400 * MIB).total == sum(base.values())
    small = replace(SIZES, parameters=10**7, hidden=576, query=576, key=576, inner=1536, vocabulary=64, aux_width=1728)
    lessons = predict(small, 100, 0, 16, 1, False).step
    assert of(small, rows=16)["step"] < lessons  # there the lesson is the peak; a GPU has none


@given(st.floats(0.05, 1.0), st.integers(GIB, 200 * GIB), st.integers(100 * MIB, 40 * GIB))
def test_together_they_take_what_was_asked_for(asked: float, total: int, takes: int) -> None:
    found = gpu(total, asked, takes)
    told = found.utilization
    if not found.used:
        assert told == asked and found.lowered < 0.5 * asked
        return
    assert 0.5 * asked <= told < asked
    assert told * total + takes <= asked * total * (1 + 1e-9) + 1e-5 * total  # rounded down, but for float noise
    assert (told + 0.002) * total + takes > asked * total  # and by no more than that


def test_what_is_said() -> None:
    assert gpu().utilization == 0.8
    assert gpu().why == "8192 MiB for Aurora: --gpu-memory-utilization 0.9 becomes 0.8"
    tight = gpu(total=12 * GIB)
    assert not tight.used and tight.utilization == 0.9
    assert "8192 MiB would leave vLLM less than half of what it was to have" in tight.why
    given_cache = gpu(total=12 * GIB, kv_cache_given=True)
    assert given_cache.used and given_cache.utilization == 0.9
    assert given_cache.why.startswith("8192 MiB must be free beside vLLM: with --kv-cache-memory-bytes it ignores")
    off = gpu(refused="there is no learner")
    assert not off.used and off.utilization == 0.9 and off.why.startswith("not used, there is no learner: ring and")
    assert gpu().as_dict()["gpu_memory_utilization"] == {"asked": 0.9, "told": 0.8}


def test_vllm_is_told_and_the_plan_shows_it(serve_plan: plan.ServePlan, capsys: Any) -> None:
    args = Namespace(
        worker_cls="auto", scheduler_cls=None, speculative_config=None, gpu_memory_utilization=0.9,
        kv_cache_memory_bytes=None,
    )  # fmt: skip
    planned = replace(serve_plan, gpu=memory_plan.plan_gpu(serve_plan, args, 16 * GIB))
    assert planned.gpu is not None and planned.gpu.used
    memory = planned.gpu.memory
    assert memory.swap == weights_bytes(serve_plan.draft.specs)
    rows = serve_plan.ring_bytes - HEADER_BYTES
    assert rows <= memory.ring < rows + 2 * MIB
    plan_view.show(planned, "text")
    out = capsys.readouterr().out
    assert planned.gpu.why in out and f"context {CONTEXT_BYTES // MIB}" in out
    assert json.loads(json.dumps(plan_view.as_dict(planned)))["memory"]["gpu"]["bytes"] == memory.total
    plan.apply(planned, args)
    assert args.gpu_memory_utilization == planned.gpu.utilization < 0.9
    plan.apply(serve_plan, args)  # on a CPU nothing is changed
    assert args.gpu_memory_utilization == planned.gpu.utilization
    plan_view.show(serve_plan, "text")
    assert "GPU" not in capsys.readouterr().out and plan_view.as_dict(serve_plan)["memory"]["gpu"] is None


@pytest.mark.parametrize(
    ("settings", "flags", "rows"),
    [
        ({}, {}, 4096 - 1024),  # vLLM's own sizes on a large GPU; nobody fills more than half a step with proposals
        ({}, {"max_num_seqs": 64}, 64 * 8),  # as long are copies
        ({"num_speculative_tokens": 5}, {"max_num_seqs": 64}, 64 * 8),
        ({"prompt_lookup": False}, {"max_num_seqs": 64}, 64 * 3),
        ({"num_speculative_tokens": 5, "prompt_lookup_tokens": 4}, {"max_num_seqs": 64}, 64 * 5),
        ({}, {"max_num_seqs": 256, "max_num_batched_tokens": 1024}, 512 - 256),
        ({"speculate": "never"}, {}, 0),
    ],
)
def test_the_logits_of_what_is_verified_are_in_the_plan(
    serve_plan: plan.ServePlan, settings: dict[str, Any], flags: dict[str, int], rows: int
) -> None:
    args = Namespace(gpu_memory_utilization=0.9, **flags)
    changed = plan.make_plan(AuroraConfig(**settings), args, "0", serve_plan.target, serve_plan.draft, V2)
    memory = memory_plan.plan_gpu(changed, args, 80 * GIB).memory
    assert bool(memory.copies) == (settings.get("prompt_lookup", True) and settings.get("speculate") != "never")
    found = memory.logits
    assert found == rows * serve_plan.target.vocab_size * serve_plan.layout.dtype.itemsize


@pytest.mark.parametrize(
    ("flags", "variable", "copied"),
    [
        ({}, "", False),
        ({"enable_sleep_mode": True}, "", True),
        ({"enable_cumem_allocator": True}, "", True),
        ({}, "PYTORCH_CUDA_ALLOC_CONF", True),
        ({}, "PYTORCH_ALLOC_CONF", True),
    ],
)
def test_a_copy_of_the_targets_ends_is_counted_where_it_is_made(
    serve_plan: plan.ServePlan, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], variable: str, copied: bool
) -> None:
    if variable:
        monkeypatch.setenv(variable, "expandable_segments:True")
    found = memory_plan.plan_gpu(serve_plan, Namespace(gpu_memory_utilization=0.9, **flags), 80 * GIB)
    assert found.memory.target == (target_head_bytes(serve_plan.target) if copied else 0)


def test_a_ring_on_a_gpu_holds_two_of_vllms_largest_steps(serve_plan: plan.ServePlan) -> None:
    def rows(least: int, **settings: Any) -> int:
        parts = AuroraConfig(**settings), Namespace(), "0.32.0", serve_plan.target, serve_plan.draft
        made = plan.make_plan(*parts, serve_plan.model_runner, least_rows=least)
        return made.ring_rows

    on_host = rows(0)
    assert on_host == 256 * MIB // serve_plan.layout.row_bytes == rows(on_host - 1)
    assert rows(on_host + 7) == on_host + 7
    assert rows(on_host + 7, ring_mb=1) == MIB // serve_plan.layout.row_bytes  # somebody said how large
    assert memory_plan.least_rows_on_gpu(Namespace(max_num_batched_tokens=None)) == 16_384
    assert memory_plan.least_rows_on_gpu(Namespace(max_num_batched_tokens=500)) == 1000


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"learn": False}, "there is no learner"), ({"learner_device": "cpu"}, "learner_device is cpu")],
)
def test_settings_that_keep_off_the_gpu(serve_plan: plan.ServePlan, settings: dict[str, Any], said: str) -> None:
    kept_off = replace(serve_plan, config=AuroraConfig(ring_mb=1, **settings))
    found = memory_plan.plan_gpu(kept_off, Namespace(gpu_memory_utilization=0.92), 80 * GIB)
    assert found.refused == said and not found.used and found.utilization == 0.92


def test_the_server_says_what_is_wanted_and_removes_what_the_worker_made(
    serve_plan: plan.ServePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_KEY, "")  # so that it is put back
    monkeypatch.setattr("aurora_vllm.runtime.atexit.register", lambda close: None)
    monkeypatch.setattr("aurora_vllm.runtime.stopping.cleanups", [])
    silent = replace(serve_plan, config=AuroraConfig(ring_mb=1, learn=False))
    others = SHM / f"aurora-{os.getpid()}-1-{'0' * 16}-ring"  # of a server with our pid in another container
    held = os.open(others, os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_SH)
    for found, wanted in ((None, False), (gpu(), True), (gpu(refused="x"), False)):
        with Runtime(replace(silent, gpu=found), told_when_up=True) as runtime:
            assert runtime.session.on_device is wanted
            for name in (runtime.session.ring, runtime.session.bank, runtime.session.control):
                gc.collect()
                with (SHM / name).open("rb") as other, pytest.raises(BlockingIOError):  # no sweep takes it away
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            control = ControlBlock.attach(Segment.attach(runtime.session.control))
            kinds = [name for name in WorkerBlock.fields if name.endswith("_memory")]
            made = [SHM / f"aurora-1-1-0123456789abcdef-{kind}" for kind in kinds]
            for kind, page in zip(kinds, made, strict=True):
                page.touch()
                setattr(control.worker, kind, page.name)
        assert len(made) == 4 and not any(page.exists() for page in made)
        assert others.exists()
    others.unlink()
    os.close(held)


def test_this_machine_has_no_gpu_or_says_its_size() -> None:
    total = preflight.gpu_total_bytes()
    assert total is None or total > GIB
