"""The day-0 draft: shapes, what was copied where, and that a fresh target of each supported family gives one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.day0 import auxiliary_layers, draft_config, make_day0_draft

SIZES = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 320, "max_position_embeddings": 64}


def save(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def llama(
    directory: Path, layers: int = 8, tied: bool = True, heads: int = 6, kv_heads: int = 2
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        eos_token_id=319,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():  # norms that are all ones would hide a mix-up
        if module.__class__.__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight, 1.0, 0.1)
    return save(model, directory)


@pytest.mark.parametrize("tied", [True, False])
def test_draft_holds_the_targets_weights(tmp_path: Path, tied: bool) -> None:
    target = llama(tmp_path / "target", tied=tied)
    out = make_day0_draft(tmp_path / "target", tmp_path / "deep" / "draft", 100)
    config = json.loads((out / "config.json").read_text())
    draft = load_file(out / "model.safetensors")

    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["draft_vocab_size"] == 100 and config["vocab_size"] == 320 and config["num_hidden_layers"] == 1
    assert "embed_tokens.weight" not in draft  # else vLLM would not share the target's
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.items()}
    head_dim = 8
    assert shapes == {
        "fc.weight": (48, 3 * 48),
        "midlayer.self_attn.q_proj.weight": (8 * head_dim, 2 * 48),
        "midlayer.self_attn.k_proj.weight": (8 * head_dim, 2 * 48),  # one for each query head: the lesson needs it
        "midlayer.self_attn.v_proj.weight": (8 * head_dim, 2 * 48),
        "midlayer.self_attn.o_proj.weight": (48, 8 * head_dim),
        "midlayer.mlp.gate_proj.weight": (64, 48),
        "midlayer.mlp.up_proj.weight": (64, 48),
        "midlayer.mlp.down_proj.weight": (48, 64),
        "midlayer.hidden_norm.weight": (48,),
        "midlayer.input_layernorm.weight": (48,),
        "midlayer.post_attention_layernorm.weight": (48,),
        "norm.weight": (48,),
        "lm_head.weight": (100, 48),
        "d2t": (100,),
        "t2d": (320,),
    }
    chosen = torch.arange(100) + draft["d2t"]
    assert draft["d2t"].dtype == torch.int64
    assert torch.equal(draft["t2d"].nonzero().flatten(), chosen) and 319 in chosen  # the end token must be proposable
    head = target["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(draft["lm_head.weight"], head[chosen])
    layer = "model.layers.5."
    assert torch.equal(draft["midlayer.self_attn.q_proj.weight"][:48, 48:], target[layer + "self_attn.q_proj.weight"])
    keys = target[layer + "self_attn.k_proj.weight"].view(2, 1, head_dim, 48).expand(2, 3, head_dim, 48)
    assert torch.equal(draft["midlayer.self_attn.k_proj.weight"][:48, 48:], keys.reshape(48, 48))
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 8  # two more, silent, for induction
    output = draft["midlayer.self_attn.o_proj.weight"]
    assert torch.equal(output[:, :48], target[layer + "self_attn.o_proj.weight"]) and not output[:, 48:].any()
    assert torch.equal(draft["midlayer.mlp.down_proj.weight"], target[layer + "mlp.down_proj.weight"])
    assert torch.equal(draft["midlayer.hidden_norm.weight"], target[layer + "input_layernorm.weight"])
    aux = torch.randn(5, 3 * 48)
    torch.testing.assert_close(aux @ draft["fc.weight"].T, aux[:, 96:])


def test_layers_that_do_more_than_llamas_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    target = save(Gemma2ForCausalLM(Gemma2Config(**sizes)), tmp_path / "gemma2")
    with pytest.raises(ValueError, match="it is a gemma2: not a Llama-shaped model"):
        make_day0_draft(tmp_path / "gemma2", tmp_path / "draft", 100)
    save(LlamaForCausalLM(LlamaConfig(**sizes)), tmp_path / "more")
    file = tmp_path / "more" / "model.safetensors"
    extra = "model.layers.5.pre_feedforward_layernorm.weight"
    save_file(load_file(file) | {extra: target[extra]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its layers have pre_feedforward_layernorm, which Llama's do not"):
        make_day0_draft(tmp_path / "more", tmp_path / "draft", 100)
    assert not (tmp_path / "draft").exists()


def test_heads_the_target_has_too_few_of_are_its_own_again(tmp_path: Path) -> None:
    """Attention narrower than the residual stream: a value per channel takes six heads, the target has two."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    target = save(LlamaForCausalLM(config), tmp_path / "target")
    draft = load_file(make_day0_draft(tmp_path / "target", tmp_path / "draft", 100) / "model.safetensors")
    for name in ("q", "k"):
        rows = target[f"model.layers.5.self_attn.{name}_proj.weight"]
        heads = draft[f"midlayer.self_attn.{name}_proj.weight"][:, 48:].view(8, 8, 48)
        for i, head in enumerate(heads):
            start = 8 * i % len(rows)
            assert torch.equal(head, rows[start : start + 8])
    output = draft["midlayer.self_attn.o_proj.weight"]
    assert torch.equal(output[:, :16], target["model.layers.5.self_attn.o_proj.weight"]) and not output[:, 16:].any()


def test_qwen3_head_norms_are_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SIZES,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[5].self_attn.q_norm.weight, 2.0, 0.1)
    save(model, tmp_path / "target")
    make_day0_draft(tmp_path / "target", tmp_path / "draft", 64)
    draft = load_file(tmp_path / "draft" / "model.safetensors")
    hidden = torch.randn(2000, 48)
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    folded = (hidden @ draft["midlayer.self_attn.q_proj.weight"][:64, 48:].T).view(-1, 4, 16)
    exact = model.model.layers[5].self_attn.q_norm(model.model.layers[5].self_attn.q_proj(hidden).view(-1, 4, 16))
    assert torch.nn.functional.cosine_similarity(folded.flatten(), exact.flatten(), dim=0) > 0.95
    assert 0.9 < folded.norm() / exact.norm() < 1.1


@pytest.mark.parametrize("layers", range(2, 41))
def test_auxiliary_layers_are_distinct_and_ascending(layers: int) -> None:
    ids = auxiliary_layers(layers)
    assert 0 <= ids[0] < ids[1] < ids[2] <= layers


def test_auxiliary_layers_of_usual_targets_are_eagle3s() -> None:
    assert auxiliary_layers(30) == (2, 15, 27)
    with pytest.raises(ValueError, match="at least 2 layers"):
        auxiliary_layers(1)


@pytest.mark.parametrize("layers", [2, 4, 5, 6])
def test_small_targets(tmp_path: Path, layers: int) -> None:
    target = llama(tmp_path / "target", layers=layers)
    make_day0_draft(tmp_path / "target", tmp_path / "draft", 64)
    draft = load_file(tmp_path / "draft" / "model.safetensors")
    layer = f"model.layers.{min(auxiliary_layers(layers)[-1], layers - 1)}."
    assert torch.equal(draft["midlayer.mlp.up_proj.weight"], target[layer + "mlp.up_proj.weight"])


def test_full_vocabulary_is_never_taken(tmp_path: Path) -> None:
    """vLLM would share the target's lm_head with the draft, and no swap could touch it."""
    llama(tmp_path / "target")
    make_day0_draft(tmp_path / "target", tmp_path / "draft", 10_000)
    assert load_file(tmp_path / "draft" / "model.safetensors")["lm_head.weight"].shape[0] == 319


def test_sharded_target_replaced_draft_and_nothing_left_over(tmp_path: Path) -> None:
    tensors = llama(tmp_path / "target", tied=False)
    (tmp_path / "target" / "model.safetensors").unlink()
    names = sorted(tensors)
    for part in range(2):
        shard = {name: tensors[name].contiguous() for name in names[part::2]}
        save_file(shard, tmp_path / "target" / f"model-0000{part}-of-00002.safetensors")
    draft = tmp_path / "drafts" / "draft"
    make_day0_draft(tmp_path / "target", draft, 32)
    make_day0_draft(tmp_path / "target", draft, 64)
    assert json.loads((draft / "config.json").read_text())["draft_vocab_size"] == 64
    assert [path.name for path in draft.parent.iterdir()] == ["draft"]


def test_a_target_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = llama(tmp_path / "target")
    del tensors["model.layers.5.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "target" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.5\.mlp\.up_proj\.weight"):
        make_day0_draft(tmp_path / "target", tmp_path / "draft", 64)
    assert not (tmp_path / "draft").exists()
    with pytest.raises(AuroraError, match="is no checkpoint"):
        make_day0_draft(tmp_path, tmp_path / "draft", 64)


def test_a_rotary_embedding_that_cannot_be_trained_becomes_a_plain_one() -> None:
    llama = SIZES | {"num_hidden_layers": 8, "rms_norm_eps": 1e-5, "num_attention_heads": 6}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known = draft_config(llama | {"rope_parameters": scaled | {"original_max_position_embeddings": 64}})
    assert known["rope_parameters"]["rope_type"] == "llama3"
    yarn = draft_config(llama | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}})
    assert yarn["rope_theta"] == 5e5 and "rope_parameters" not in yarn
    old = draft_config(llama | {"rope_theta": 7e4, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert old["rope_theta"] == 7e4 and "rope_scaling" not in old


def test_wide_targets_keep_their_key_value_heads_and_the_vocabulary_grows_with_the_width() -> None:
    llama = {"num_hidden_layers": 32, "rms_norm_eps": 1e-5, "vocab_size": 128_256, "num_attention_heads": 32}
    wide = draft_config(llama | {"hidden_size": 4096, "num_key_value_heads": 8})
    assert (wide["num_key_value_heads"], wide["draft_vocab_size"]) == (8, 32_768)
    narrow = draft_config(llama | {"hidden_size": 1024, "num_key_value_heads": 8})
    assert (narrow["num_key_value_heads"], narrow["draft_vocab_size"]) == (64, 8192)
    assert draft_config(llama | {"hidden_size": 1024}, 500)["draft_vocab_size"] == 500
    with pytest.raises(ValueError, match="no num_attention_heads"):
        draft_config({"hidden_size": 1024, "num_hidden_layers": 4, "rms_norm_eps": 1e-5, "vocab_size": 10})
