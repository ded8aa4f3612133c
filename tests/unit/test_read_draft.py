"""A draft that somebody gives: whether it fits the target, and what is wrong with its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm import checkpoint
from aurora_vllm.checkpoint import Target
from aurora_vllm.config_json import read_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.draft import bank_specs, load_draft
from tests.unit.plan_world import HIDDEN, change_config, draft_dir, target

__all__ = ["draft_dir", "target"]  # fixtures


def test_a_draft_that_fits(target: Target, draft_dir: Path) -> None:
    draft = checkpoint.read_draft(draft_dir, target)
    assert (draft.origin, draft.aux_layers, draft.vocab_size) == ("given", (2, 4, 5), 64)
    assert list(draft.specs) == bank_specs(load_draft(draft_dir))
    parameters = (p for p in load_draft(draft_dir).parameters())
    assert draft.num_parameters == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hidden_size": 32}, "its hidden_size is 32, the target's is 16"),
        ({"target_hidden_size": 32}, "its target_hidden_size is 32, the target's is 16"),
        ({"vocab_size": 99}, "its vocab_size is 99, the target's is 100"),
        ({"intermediate_size": 48}, "tensor midlayer.mlp.gate_proj.weight is [24, 16], it should be [48, 16]"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4]}, "tensor fc.weight is [16, 48], it should be [16, 32]"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 5]}, "auxiliary layers [2, 2, 5] with 8 target layers"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "auxiliary layers [2, 4, 9] with 8 target layers"),
    ],
)
def test_a_draft_that_does_not_fit(target: Target, draft_dir: Path, changes: dict[str, Any], line: str) -> None:
    change_config(draft_dir, **changes)
    with pytest.raises(AuroraError, match="does not fit owner/target: ") as caught:
        checkpoint.read_draft(draft_dir, target)
    assert line in str(caught.value)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_draft(target: Target, draft_dir: Path, key: str) -> None:
    change_config(draft_dir, **{key: {"quant_method": "fp8"}})
    with pytest.raises(AuroraError, match=r"is quantised \(fp8\), and such weights cannot be updated"):
        checkpoint.read_draft(draft_dir, target)


def test_a_draft_without_a_tensor(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors")
    del tensors["midlayer.hidden_norm.weight"]
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"has no tensor midlayer\.hidden_norm\.weight"):
        checkpoint.read_draft(draft_dir, target)


def test_a_tensor_too_many(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors") | {"midlayer.self_attn.q_norm.weight": torch.ones(8)}
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"has a tensor midlayer\.self_attn\.q_norm\.weight \[8\], which no"):
        checkpoint.read_draft(draft_dir, target)


def test_an_embedding_of_another_vocabulary(target: Target, draft_dir: Path) -> None:
    tensors = load_file(draft_dir / "model.safetensors") | {"embed_tokens.weight": torch.zeros(7, HIDDEN)}
    save_file(tensors, draft_dir / "model.safetensors")
    with pytest.raises(AuroraError, match=r"embed_tokens\.weight is \[7, 16\], it should be \[100, 16\]"):
        checkpoint.read_draft(draft_dir, target)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_damaged_checkpoint(draft_dir: Path, size: int) -> None:
    file = draft_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(AuroraError, match="download it again"):
        checkpoint.read_shapes(draft_dir)


def test_no_checkpoint(tmp_path: Path, target: Target) -> None:
    with pytest.raises(AuroraError, match=r"holds no \*\.safetensors"):
        checkpoint.read_shapes(tmp_path)
    with pytest.raises(AuroraError, match=r"cannot read its config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(AuroraError, match="is not JSON"):
        read_config(tmp_path)
    with pytest.raises(AuroraError, match="is no directory"):
        checkpoint.read_draft(tmp_path / "nowhere", target)


def test_the_fingerprint_follows_the_weights_and_the_settings(target: Target) -> None:
    first = checkpoint.fingerprint(target.directory, 64)
    assert first == checkpoint.fingerprint(target.directory, 64)
    assert first != checkpoint.fingerprint(target.directory, 65)
    save_file({"x": torch.zeros(3)}, target.directory / "model.safetensors")
    assert first != checkpoint.fingerprint(target.directory, 64)
    second = checkpoint.fingerprint(target.directory, 64)
    change_config(target.directory, rms_norm_eps=1e-5)
    assert second != checkpoint.fingerprint(target.directory, 64)
