"""The draft as a checkpoint: names, shapes, files; and its RoPE."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.draft import Eagle3Draft, bank_specs, bank_tensors, load_draft, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.rope import cos_sin, inverse_frequencies, rotate
from tests.unit.naive_eagle3 import Sizes, random_case

NAMES = {
    "fc.weight",
    *(f"midlayer.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"midlayer.{x}.weight" for x in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
    "norm.weight",
    "lm_head.weight",
    "d2t",
}
SIZES = Sizes([5], [2])


def saved(directory: Path, **options: Any) -> Path:
    save_draft(random_case(SIZES, **options)[0], directory, SIZES.config(**options))
    return directory


def test_names_are_those_of_a_checkpoint() -> None:
    draft, _, _ = random_case(SIZES)
    assert set(draft.state_dict()) == NAMES == {spec.name for spec in bank_specs(draft)} == set(bank_tensors(draft))
    assert {name for name, p in draft.named_parameters() if p.requires_grad} == NAMES - {"d2t"}


def test_bank_has_the_dtype_vllm_runs_in() -> None:
    draft, _, _ = random_case(SIZES)
    specs = {spec.name: spec for spec in bank_specs(draft, torch.bfloat16)}
    tensors = bank_tensors(draft, torch.bfloat16)
    assert specs["fc.weight"].dtype == tensors["fc.weight"].dtype == torch.bfloat16
    assert specs["d2t"].dtype == tensors["d2t"].dtype == torch.int64
    assert all(specs[name].shape == tuple(tensor.shape) for name, tensor in tensors.items())
    assert bank_tensors(draft)["fc.weight"].data_ptr() == draft.fc.weight.data_ptr()


def test_saved_and_loaded(tmp_path: Path) -> None:
    draft, _, _ = random_case(SIZES)
    again = load_draft(saved(tmp_path))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in draft.state_dict().items())
    files = load_file(tmp_path / "model.safetensors")
    assert files["t2d"].nonzero().squeeze(1).tolist() == draft.target_ids.tolist()
    assert again.embed_tokens is None


def test_one_vocabulary_has_no_map(tmp_path: Path) -> None:
    """vLLM refuses a d2t where draft and target vocabulary are one."""
    sizes = Sizes([5], [2], vocab=8, draft_vocab=8)
    save_draft(random_case(sizes)[0], tmp_path, sizes.config())
    assert not {"d2t", "t2d"} & set(load_file(tmp_path / "model.safetensors"))
    assert load_draft(tmp_path).target_ids.tolist() == list(range(8))


def test_own_embedding_survives(tmp_path: Path) -> None:
    draft, _, _ = random_case(SIZES)
    draft.embed_tokens = torch.randn(SIZES.vocab, SIZES.hidden)
    save_draft(draft, tmp_path, SIZES.config(torch_dtype="bfloat16"))
    again = load_draft(tmp_path)
    assert again.embed_tokens is not None and again.embed_tokens.dtype == torch.float32
    assert torch.equal(again.embed_tokens, draft.embed_tokens.bfloat16().float())
    assert set(again.state_dict()) == NAMES


def damage_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["norm.weight"]


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:].contiguous()


def damage_extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(4)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_missing, "no tensor norm.weight"),
        (damage_shape, r"fc.weight has shape \[6, 17\]"),
        (damage_extra, "q_norm"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, damage: Any, says: str) -> None:
    file = saved(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(AuroraError, match=says):
        load_draft(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_hidden_layers": 2},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 3, "num_attention_heads": 4},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"hidden_size": "wide"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (saved(tmp_path) / "config.json").write_text(json.dumps({**SIZES.config(), **wrong}))
    with pytest.raises(AuroraError):
        load_draft(tmp_path)


def test_a_draft_of_another_width_needs_its_own_embedding(tmp_path: Path) -> None:
    sizes = SIZES.config(target_hidden_size=8)
    draft = Eagle3Draft(Eagle3Config.from_hf(sizes))
    save_draft(draft, tmp_path, sizes)
    with pytest.raises(AuroraError, match="embed_tokens"):
        load_draft(tmp_path)
    draft.embed_tokens = torch.randn(SIZES.vocab, SIZES.hidden)
    save_draft(draft, tmp_path, sizes)
    assert load_draft(tmp_path).fc.weight.shape == (6, 24)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="is no checkpoint"):
        load_draft(tmp_path)


def test_config_reads_both_spellings() -> None:
    old = Eagle3Config.from_hf(SIZES.config(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0}))
    spelled = {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}
    new = Eagle3Config.from_hf({**SIZES.config(), "rope_theta": None, "rope_parameters": spelled})
    assert old.rope == new.rope == spelled
    assert Eagle3Config.from_hf(SIZES.config(eagle_aux_hidden_state_layer_ids=[1, 2])).num_aux_hidden_states == 2
    nested = SIZES.config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 5, 7]})
    assert Eagle3Config.from_hf(nested).aux_layer_ids == (1, 2, 5, 7)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_is_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = {**rope, "rope_theta": 500.0}
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, head_dim=16, rope_parameters=rope, max_position_embeddings=256
    )
    x, positions = torch.randn(9, 2, 16), torch.arange(5, 14)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions.unsqueeze(0))
    wanted, _ = apply_rotary_pos_emb(x.transpose(0, 1).unsqueeze(0), x.transpose(0, 1).unsqueeze(0), cos, sin)
    found = rotate(x, *cos_sin(positions, inverse_frequencies(16, rope)))
    torch.testing.assert_close(found, wanted[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_collate_pads_and_knows_what_a_greedy_target_chose() -> None:
    def trajectory(start: int, length: int, prompt: int, temperature: float) -> Any:
        return SimpleNamespace(
            start=start,
            token_ids=torch.arange(100, 100 + length),
            aux=torch.ones(length, 6, dtype=torch.bfloat16),
            last=torch.ones(length, 2, dtype=torch.bfloat16),
            prompt_length=prompt,
            temperature=temperature,
            next_token=50,
            branches=[],
        )

    # A whole greedy request; one that starts inside its prompt; one whose prompt lies before it; a sampled one.
    batch = collate(
        [trajectory(0, 5, 2, 0.0), trajectory(4, 3, 6, 0.0), trajectory(8, 3, 6, 0.0), trajectory(0, 4, 1, 0.7)]
    )
    assert batch.aux.dtype == torch.float32 and batch.last[1].sum() == 6
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 3, 4]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert batch.positions[1].tolist() == [4, 5, 6, 7, 8]
    assert batch.target_argmax is not None
    assert batch.target_argmax.tolist() == [
        [-1, 102, 103, 104, 50],
        [-1, 102, 50, -1, -1],
        [101, 102, 50, -1, -1],
        [-1, -1, -1, -1, -1],
    ]
    assert batch.emitted is not None
    assert batch.emitted[:3].equal(batch.target_argmax[:3]) and batch.emitted[3].tolist() == [101, 102, 103, 50, -1]
    with pytest.raises(ValueError):
        collate([])
    with pytest.raises(ValueError):
        collate([trajectory(0, 0, 2, 0.0)])
