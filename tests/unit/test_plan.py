"""What a run will be: sizes, and what vLLM's arguments become."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import checkpoint, plan
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.spec_decode.model_runner import ModelRunner
from aurora_vllm.spec_decode.scheduler import _lengths
from aurora_vllm.transport.bank import bank_bytes
from aurora_vllm.transport.ring import ring_bytes
from tests.unit.plan_world import HIDDEN, V1, V2, draft_dir, serve_plan, target

__all__ = ["draft_dir", "serve_plan", "target"]  # fixtures


def test_sizes(serve_plan: plan.ServePlan) -> None:
    row = 64 + 4 * (3 + 1) * HIDDEN  # 16 words of metadata; three aux states and the last, float32
    assert serve_plan.layout.row_bytes == row
    assert serve_plan.ring_rows == 2**20 // row
    assert serve_plan.ring_bytes == ring_bytes(row, 2**20 // row)
    assert serve_plan.bank_bytes == bank_bytes(serve_plan.draft.specs)


def test_a_ring_that_is_too_small(target: Target, draft_dir: Path) -> None:
    wide = replace(target, hidden_size=16384)
    with pytest.raises(AuroraError, match=r"--aurora-ring-mb 1 holds 3 rows .* at least 17, better 272"):
        draft = checkpoint.read_draft(draft_dir, target)
        plan.make_plan(AuroraConfig(ring_mb=1), Namespace(), "0.32.0", wide, draft, V1)


def test_vllms_arguments(serve_plan: plan.ServePlan) -> None:
    args = Namespace(
        port=80,
        worker_cls="auto",
        scheduler_cls=None,
        speculative_config={"draft-sample-method": "greedy", "model": "x"},
    )
    plan.apply(replace(serve_plan, copied_tokens=2), args)
    assert vars(args) == {
        "port": 80,
        "worker_cls": "aurora_vllm.spec_decode.worker.AuroraWorker",
        "scheduler_cls": "aurora_vllm.spec_decode.scheduler.AuroraScheduler",
        "speculative_config": {
            "draft_sample_method": "greedy",
            "method": "eagle3",
            "model": str(serve_plan.draft.directory),
            "num_speculative_tokens": 3,
        },
    }


def test_cached_blocks_are_kept_where_vllm_can(serve_plan: plan.ServePlan) -> None:
    args = Namespace(worker_cls="auto", scheduler_cls=None, speculative_config=None)
    plan.apply(serve_plan, args, speculative_fields={"disable_eagle_block_drop"})
    assert args.speculative_config["disable_eagle_block_drop"] is True
    args.speculative_config = {"disable-eagle-block-drop": False}  # the user wants it
    plan.apply(serve_plan, args, speculative_fields={"disable_eagle_block_drop"})
    assert args.speculative_config["disable_eagle_block_drop"] is False
    args.speculative_config = None
    fields = {"disable_eagle_block_drop", "disable_lookahead_block_hashes"}  # this vLLM knows what to keep
    plan.apply(serve_plan, args, speculative_fields=fields)
    assert "disable_eagle_block_drop" not in args.speculative_config


@pytest.mark.parametrize(
    ("runner", "settings", "flags", "most"),
    [
        (V1, {}, {}, 8),
        (V1, {"prompt_lookup_tokens": 12}, {}, 12),
        (V2, {"prompt_lookup_tokens": 12}, {}, 8),
        (V2, {"prompt_lookup_tokens": 4}, {}, 4),
        (V1, {"prompt_lookup": False}, {}, 0),
        (V2, {"speculate": "never"}, {}, 0),
        (V2, {}, {"speculative_config": {"draft-sample-method": "probabilistic"}}, 0),
        (V1, {}, {"enable_lora": True}, 3),
        (V2, {"prompt_lookup_tokens": 2}, {"enable_lora": True}, 2),
    ],
)
def test_how_much_is_copied(
    runner: ModelRunner, settings: dict[str, Any], flags: dict[str, Any], most: int, serve_plan: plan.ServePlan
) -> None:
    args = Namespace(**flags)
    config = AuroraConfig(ring_mb=1, **settings)
    made = plan.make_plan(config, args, "0.32.0", serve_plan.target, serve_plan.draft, runner)
    assert made.copied_tokens == most


def test_without_a_learner_the_ring_is_a_stub(serve_plan: plan.ServePlan) -> None:
    config = AuroraConfig(learn=False)
    made = plan.make_plan(config, Namespace(), "0.32.0", serve_plan.target, serve_plan.draft, V2, least_rows=16_384)
    assert made.ring_rows == plan.MIN_RING_ROWS and made.bank_bytes == serve_plan.bank_bytes


def test_v2_captures_graphs_for_every_draft_length(serve_plan: plan.ServePlan) -> None:
    """The table says K = 3, 2, 1 and 0 somewhere, and how long copies are; one of the user's stays."""
    args = Namespace(worker_cls="auto", scheduler_cls=None, speculative_config=None)
    for_v2 = replace(serve_plan, model_runner=V2, copied_tokens=8)
    plan.apply(for_v2, args)
    table = [[1, 1, 8], [2, 2, 3], [3, 3, 2], [4, 4, 1], [5, 5, 0]]
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == table
    assert args.speculative_config["num_speculative_tokens"] == 8
    assert _lengths(Namespace(**args.speculative_config)) == (1, 2, 3, 8)  # what our scheduler makes of it
    args.speculative_config = None
    plan.apply(replace(for_v2, copied_tokens=0), args)
    table = [[1, 1, 3], [2, 2, 2], [3, 3, 1], [4, 4, 0]]
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == table
    assert args.speculative_config["num_speculative_tokens"] == 3
    args.speculative_config = {"num-speculative-tokens-per-batch-size": [[1, 8, 2]]}
    plan.apply(for_v2, args)
    assert args.speculative_config["num_speculative_tokens_per_batch_size"] == [[1, 8, 2]]
