"""The layer that a day-0 draft starts with, of targets whose own cannot be read: quantized ones and mixtures of
experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import load_draft

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
Tensors = dict[str, torch.Tensor]


def as_float8(name: str, weight: torch.Tensor) -> Tensors:
    """As in Qwen3-8B-FP8, or a checkpoint of compressed-tensors."""
    return {name: weight.to(torch.float8_e4m3fn), name + "_scale": torch.ones(len(weight), 1)}


def as_int8(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), name + "_scale": scale}


def as_gptq(name: str, weight: torch.Tensor) -> Tensors:
    """Eight 4-bit numbers in an int32, under other names."""
    stem = name.removesuffix("weight")
    packed = torch.zeros(weight.shape[1] // 8, len(weight), dtype=torch.int32)
    return {
        stem + "qweight": packed,
        stem + "scales": torch.ones(1, len(weight)),
        stem + "g_idx": torch.arange(weight.shape[1], dtype=torch.int32),
    }


def llama(directory: Path) -> Tensors:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def quantize(directory: Path, how: Callable[[str, torch.Tensor], Tensors], **more: torch.Tensor) -> None:
    """Rewrite all projections of a target's layers."""
    file = directory / "model.safetensors"
    tensors: Tensors = dict(more)
    for name, tensor in load_file(file).items():
        tensors |= how(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "any"}
    (directory / "config.json").write_text(json.dumps(config))


def assert_passes_the_residual_stream(draft_dir: Path) -> None:
    """The draft's first guess is what the target's norm and head say of its last auxiliary state."""
    draft = load_draft(draft_dir)
    aux = torch.randn(5, 3 * 48, generator=torch.Generator().manual_seed(1))
    residual = draft.combine(aux)
    attended = torch.randn(5, draft.config.num_attention_heads * draft.config.head_dim)
    torch.testing.assert_close(draft.finish(attended, residual), aux[:, -48:])
    draft.finish(attended, residual).square().sum().backward()
    layer = draft.midlayer
    for output, name in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
        assert output.weight.grad is not None and output.weight.grad.abs().max() > 0, f"{name} cannot begin to learn"


@pytest.mark.parametrize("how", [as_float8, as_int8, as_gptq])
def test_a_quantized_targets_draft_starts_silent(tmp_path: Path, how: Callable[..., Tensors]) -> None:
    tensors = llama(tmp_path / "target")
    quantize(tmp_path / "target", how, **{"model.layers.5.self_attn.k_scale": torch.ones(())})
    draft_dir = make_day0_draft(tmp_path / "target", tmp_path / "draft", 100)
    assert_passes_the_residual_stream(draft_dir)
    draft = load_file(draft_dir / "model.safetensors")
    assert draft["midlayer.self_attn.q_proj.weight"].shape == (8 * 8, 2 * 48)  # with heads for the lesson
    assert torch.equal(draft["midlayer.hidden_norm.weight"], tensors["model.layers.5.input_layernorm.weight"])
    assert {tensor.dtype for tensor in draft.values()} == {torch.float32, torch.int64, torch.bool}


def test_what_a_quantized_target_left_as_it_was_is_taken_over(tmp_path: Path) -> None:
    tensors = llama(tmp_path / "target")
    quantize(tmp_path / "target", lambda name, weight: as_int8(name, weight) if ".mlp." in name else {name: weight})
    draft = load_file(make_day0_draft(tmp_path / "target", tmp_path / "draft", 100) / "model.safetensors")
    output = draft["midlayer.self_attn.o_proj.weight"]
    assert torch.equal(output[:, :48], tensors["model.layers.5.self_attn.o_proj.weight"])
    assert not draft["midlayer.mlp.down_proj.weight"].any()


def test_a_mixture_of_experts_gives_its_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "target")
    draft = load_file(make_day0_draft(tmp_path / "target", tmp_path / "draft", 100) / "model.safetensors")
    output = draft["midlayer.self_attn.o_proj.weight"]
    assert torch.equal(output[:, :48], model.model.layers[5].self_attn.o_proj.weight)
    assert draft["midlayer.mlp.gate_proj.weight"].shape == (64, 48) and draft["midlayer.mlp.gate_proj.weight"].any()
    assert not draft["midlayer.mlp.down_proj.weight"].any()


def test_fused_projections_are_taken_apart(tmp_path: Path) -> None:
    """Phi-3 holds what Llama does, in fewer tensors."""
    tensors = llama(tmp_path / "llama")
    prefix, fused = "model.layers.5.", dict(tensors)
    qkv = [fused.pop(f"{prefix}self_attn.{kind}_proj.weight") for kind in "qkv"]
    gate_up = [fused.pop(f"{prefix}mlp.{kind}_proj.weight") for kind in ("gate", "up")]
    fused |= {
        f"{prefix}self_attn.qkv_proj.weight": torch.cat(qkv),
        f"{prefix}mlp.gate_up_proj.weight": torch.cat(gate_up),
    }
    save_file(fused, tmp_path / "llama" / "fused.safetensors", metadata={"format": "pt"})
    separate = load_file(make_day0_draft(tmp_path / "llama", tmp_path / "draft", 100) / "model.safetensors")
    (tmp_path / "llama" / "fused.safetensors").rename(tmp_path / "llama" / "model.safetensors")
    draft = load_file(make_day0_draft(tmp_path / "llama", tmp_path / "draft", 100) / "model.safetensors")
    assert draft.keys() == separate.keys()
    for name, tensor in draft.items():
        assert torch.equal(tensor, separate[name]), name


def test_attention_sinks_and_biases_are_left_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 8)
    model = GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "target")
    draft_dir = make_day0_draft(tmp_path / "target", tmp_path / "draft", 100)
    draft = load_file(draft_dir / "model.safetensors")
    output = draft["midlayer.self_attn.o_proj.weight"]
    assert torch.equal(output[:, :48], model.model.layers[5].self_attn.o_proj.weight)
    assert not any(name.endswith((".bias", ".sinks")) for name in draft)
    rope = json.loads((draft_dir / "config.json").read_text())  # the target's is YaRN
    assert rope["rope_theta"] == 150_000 and "rope_parameters" not in rope


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    llama(tmp_path / "target")
    quantize(tmp_path / "target", as_int8)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | as_float8("lm_head.weight", tensors["lm_head.weight"]), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its lm_head is quantized \(torch.float8_e4m3fn\)"):
        make_day0_draft(tmp_path / "target", tmp_path / "draft", 100)
    del tensors["lm_head.weight"]
    save_file(tensors | as_gptq("lm_head.weight", torch.ones(320, 48)), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        make_day0_draft(tmp_path / "target", tmp_path / "draft", 100)
    assert not (tmp_path / "draft").exists()
