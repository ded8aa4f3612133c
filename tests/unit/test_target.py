"""The target's embedding and lm_head: read from a checkpoint, nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner import target
from aurora_vllm.learner.target import TargetHead, lent_target_head, load_target_head

EMBEDDING, HEAD, OTHER = torch.randn(10, 4), torch.randn(10, 4), torch.randn(3, 3)


def checkpoint(directory: Path, shards: list[dict[str, torch.Tensor]], **config: object) -> Path:
    for n, shard in enumerate(shards):
        save_file(shard, directory / f"model-{n}.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    shards = [{"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": OTHER}]
    head = load_target_head(checkpoint(tmp_path, shards, tie_word_embeddings=True))
    assert head.lm_head is head.embed_tokens and torch.equal(head.embed_tokens, EMBEDDING)


def test_untied_head_in_another_shard(tmp_path: Path) -> None:
    shards = [{"model.language_model.embed_tokens.weight": EMBEDDING.bfloat16()}, {"lm_head.weight": HEAD.bfloat16()}]
    head = load_target_head(checkpoint(tmp_path, shards))
    assert head.lm_head.dtype == torch.bfloat16 and torch.equal(head.lm_head, HEAD.bfloat16())
    assert head.embed(torch.tensor([3])).dtype == torch.float32
    assert head.rows(torch.tensor([1, 5])).dtype == torch.float32


def test_what_is_lent_is_not_copied(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, [])
    flat = [torch.cat([matrix, OTHER[0, 0].expand(2, 4)]).flatten().view(torch.uint8) for matrix in (EMBEDDING, HEAD)]
    head = lent_target_head(directory, flat[0], flat[1], torch.float32, (10, 4))
    assert torch.equal(head.embed_tokens, EMBEDDING) and torch.equal(head.lm_head, HEAD)
    assert (head.embed_tokens.data_ptr(), head.lm_head.data_ptr()) == (flat[0].data_ptr(), flat[1].data_ptr())
    tied = lent_target_head(directory, flat[0], flat[0], torch.float32, (10, 4))
    assert tied.lm_head is tied.embed_tokens
    with pytest.raises(AuroraError, match="lends 12 rows of the target's 13"):
        lent_target_head(directory, flat[0], flat[0], torch.float32, (13, 4))


def test_a_lent_head_is_of_no_use_either_where_logits_are_transformed(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, [], final_logit_softcapping=30.0)
    with pytest.raises(AuroraError, match="softcapping"):
        lent_target_head(directory, HEAD, HEAD, torch.float32, (10, 4))


@pytest.mark.parametrize("config", [{}, {"final_logit_softcapping": 30.0}])
def test_what_is_no_use_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    shards = [{"model.embed_tokens.weight": EMBEDDING}] if config else [{"model.norm.weight": OTHER}]
    with pytest.raises(AuroraError, match="softcapping" if config else "no token embedding"):
        load_target_head(checkpoint(tmp_path, shards, **config))


@pytest.mark.parametrize("name", ["lm_head.qweight", "language_model.lm_head.weight_scale"])
def test_a_quantized_head_is_refused(tmp_path: Path, name: str) -> None:
    """Without this the embedding would be taken for it, as where both are tied."""
    shards = [{"model.embed_tokens.weight": EMBEDDING, "lm_head.bias": HEAD[:, 0].clone()}, {name: OTHER}]
    with pytest.raises(AuroraError, match=rf"quantized lm_head \({name}\).*--no-aurora-learn"):
        load_target_head(checkpoint(tmp_path, shards))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, [{"model.embed_tokens.weight": EMBEDDING}])
    (directory / "model-0.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(AuroraError, match=r"holds a damaged safetensors file: .*; download it again"):
        target.check_learnable(directory)


def test_argmax_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_VOCABULARY_CHUNK", 3)
    states = torch.randn(50, 4)
    head = TargetHead(EMBEDDING, torch.cat([HEAD, HEAD]))  # every logit twice: the lower id wins
    assert torch.equal(head.argmax(states), (states @ HEAD.T).argmax(-1))


def test_rows_follow_the_vocabulary() -> None:
    head = TargetHead(EMBEDDING, HEAD)
    ids = torch.tensor([1, 5])
    assert head.rows(ids) is head.rows(ids.clone())
    ids[1] = 6
    assert torch.equal(head.rows(ids), HEAD[[1, 6]])
