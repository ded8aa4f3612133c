"""A deeper target for the benchmarks: the same answers and states, from more layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.deeper import deepened

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("models") / "small"
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize("more", [1, 4])
def test_more_layers_change_no_answer_and_none_of_the_states_a_draft_reads(model: Path, more: int) -> None:
    deep = deepened(model, more)
    assert (deep / "tokenizer.json").is_file()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        short, long = (
            LlamaForCausalLM.from_pretrained(path)(tokens, output_hidden_states=True) for path in (model, deep)
        )
    assert torch.equal(short.logits, long.logits)
    total = LAYERS + more
    assert len(long.hidden_states) == total + 1
    for before, after in ((2, 2), (LAYERS // 2, total // 2), (LAYERS - 3, total - 3)):
        assert torch.equal(short.hidden_states[before], long.hidden_states[after])


def test_it_is_made_once_and_none_is_the_model_itself(model: Path) -> None:
    written = (deepened(model, 2) / "model.safetensors").stat().st_mtime_ns
    assert (deepened(model, 2) / "model.safetensors").stat().st_mtime_ns == written
    assert deepened(model, 0) == model
