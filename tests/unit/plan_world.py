"""A target, a draft that fits it, and the plan of a run with both."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aurora_vllm import checkpoint, plan
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.draft import Eagle3Draft, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.spec_decode.compat import Probe
from aurora_vllm.spec_decode.model_runner import ModelRunner

HIDDEN, VOCABULARY, LAYERS = 16, 100, 8
DRAFT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "draft_vocab_size": 64,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "num_hidden_layers": 1,
}
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
}
V1, V2 = ModelRunner("V1", "no Triton for this device"), ModelRunner("V2", "vLLM's default")


@pytest.fixture
def target(tmp_path: Path) -> Target:
    directory = tmp_path / "target"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TARGET))
    save_file({"model.embed_tokens.weight": torch.zeros(VOCABULARY, HIDDEN)}, directory / "model.safetensors")
    return Target("owner/target", directory, HIDDEN, LAYERS, VOCABULARY, "float32")


@pytest.fixture
def draft_dir(tmp_path: Path) -> Path:
    save_draft(Eagle3Draft(Eagle3Config.from_hf(DRAFT)), tmp_path / "draft", DRAFT)
    return tmp_path / "draft"


@pytest.fixture
def serve_plan(target: Target, draft_dir: Path) -> plan.ServePlan:
    probes = (Probe("a:b", True, "the tested source"),)
    draft = checkpoint.read_draft(draft_dir, target)
    return plan.make_plan(AuroraConfig(ring_mb=1), Namespace(), "0.32.0", target, draft, V1, probes)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
