"""A draft from disk goes into the bank whole and checked, or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.draft import Eagle3Draft, bank_specs, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.from_disk import publish_from_disk
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.segment import Segment

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "draft_vocab_size": 64,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "num_hidden_layers": 1,
}
EMBEDDING = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))


def new_draft(seed: int) -> Eagle3Draft:
    torch.manual_seed(seed)
    draft = Eagle3Draft(Eagle3Config.from_hf(CONFIG))
    draft.d2t.copy_(torch.arange(64).clamp(min=30) - 30)  # 0..30, then every second id
    return draft


@pytest.fixture
def running() -> Eagle3Draft:
    return new_draft(1)


@pytest.fixture
def bank(running: Eagle3Draft) -> Iterator[WeightBank]:
    specs = bank_specs(running)
    with Segment.create("bank", bank_bytes(specs)) as segment:
        yield WeightBank.create(segment, specs)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_draft(new_draft(2), tmp_path / "new", CONFIG)
    return tmp_path / "new"


def change(directory: Path, **tensors: Any) -> None:
    """Replace tensors of a checkpoint; None takes one out. Dots are written as two underscores."""
    held = load_file(directory / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in held.items() if v is not None}, directory / "model.safetensors")


def publish(bank: WeightBank, directory: Path, running: Eagle3Draft) -> Eagle3Draft:
    return publish_from_disk(bank, 5, directory, running, lambda: EMBEDDING)


def assert_published(bank: WeightBank, wanted: Eagle3Draft) -> None:
    assert bank.published() == 5
    found = bank.read(5).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())


def test_what_fits_is_published_and_the_running_draft_is_left_alone(
    bank: WeightBank, directory: Path, running: Eagle3Draft
) -> None:
    before = copy.deepcopy(running.state_dict())
    draft = publish(bank, directory, running)
    assert_published(bank, new_draft(2))
    assert_published(bank, draft)
    assert all(torch.equal(before[name], tensor) for name, tensor in running.state_dict().items())


def test_as_auroras_trainer_writes_it(bank: WeightBank, directory: Path, running: Eagle3Draft) -> None:
    tensors = load_file(directory / "model.safetensors") | {"embed_tokens.weight": EMBEDDING.bfloat16()}
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    draft = publish(bank, directory, running)
    assert_published(bank, new_draft(2))
    assert draft.embed_tokens is None  # the target's, as before


def test_half_precision_becomes_the_banks(bank: WeightBank, directory: Path, running: Eagle3Draft) -> None:
    half = load_file(directory / "model.safetensors")["fc.weight"].bfloat16()
    change(directory, fc__weight=half)
    publish(bank, directory, running)
    assert torch.equal(bank.read(5).tensors["fc.weight"], half.float())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"norm__weight": None}, "the draft has no tensor norm.weight"),
        ({"extra": torch.zeros(1)}, "the draft has a tensor extra that"),
        ({"fc__weight": torch.zeros(16, 32)}, "tensor fc.weight has shape [16, 32]"),
        ({"fc__weight": torch.zeros(16, 48, dtype=torch.int8)}, "tensor fc.weight has dtype torch.int8"),
        ({"fc__weight": torch.full((16, 48), torch.nan)}, "fc.weight is not finite"),
        ({"d2t": torch.zeros(64)}, "tensor d2t has dtype torch.float32"),
        ({"d2t": torch.full((64,), 40)}, "tensor d2t is no map into the target's 100 tokens"),
        ({"d2t": torch.full((64,), -1)}, "tensor d2t is no map into the target's 100 tokens"),
        ({"d2t": -torch.arange(64)}, "tensor d2t is no map into the target's 100 tokens"),
        ({"embed_tokens__weight": EMBEDDING + 0.1}, "embed_tokens.weight is not the embedding in use"),
        ({"embed_tokens__weight": EMBEDDING[:7]}, "embed_tokens.weight has shape [7, 16]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    bank: WeightBank, directory: Path, running: Eagle3Draft, changes: dict[str, Any], line: str
) -> None:
    change(directory, **changes)
    with pytest.raises(AuroraError) as caught:
        publish(bank, directory, running)
    assert line in str(caught.value)
    assert str(directory) in str(caught.value)
    assert bank.published() == 0


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("hidden_size", 32, "its config has hidden_size = 32, the running draft's has 16"),
        ("rms_norm_eps", 1e-5, "its config has rms_norm_eps = 1e-05, the running draft's has 1e-06"),
        ("rope_theta", 5e5, "its config has rope = "),
        ("num_hidden_layers", 2, "num_hidden_layers = 2"),
        ("eagle_aux_hidden_state_layer_ids", [1, 4, 5], "its config has aux_layer_ids = (1, 4, 5)"),
        ("eagle_aux_hidden_state_layer_ids", None, None),  # Aurora's configs do not say
    ],
)
def test_a_config_that_computes_something_else(
    bank: WeightBank, directory: Path, running: Eagle3Draft, key: str, value: Any, line: str | None
) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    if line is None:
        publish(bank, directory, running)
        return
    with pytest.raises(AuroraError) as caught:
        publish(bank, directory, running)
    assert line in str(caught.value)
    assert bank.published() == 0


def test_an_embedding_of_the_drafts_own_stays(bank: WeightBank, directory: Path, running: Eagle3Draft) -> None:
    running.embed_tokens = EMBEDDING + 1
    with pytest.raises(AuroraError, match="is not the embedding in use"):
        publish(bank, directory, running)  # none of its own: it wants the target's
    change(directory, embed_tokens__weight=(EMBEDDING + 1).half())
    assert publish(bank, directory, running).embed_tokens is running.embed_tokens


def test_no_checkpoint(bank: WeightBank, directory: Path, running: Eagle3Draft, tmp_path: Path) -> None:
    def refused(line: str, where: Path = directory) -> None:
        with pytest.raises(AuroraError) as caught:
            publish(bank, where, running)
        assert line in str(caught.value)

    refused("is no directory", tmp_path / "nowhere")
    (directory / "model.safetensors").write_bytes(b"damaged")
    refused("cannot be read (SafetensorError")
    (directory / "model.safetensors").unlink()
    refused("there is no *.safetensors and no *.bin file")
    torch.save({"x": tmp_path}, directory / "pytorch_model.bin")  # a pickle that would build an object
    refused("cannot be read (UnpicklingError")
    torch.save({"x": 3}, directory / "pytorch_model.bin")
    refused("more than tensors in it")
    (directory / "config.json").write_text("[]")
    refused("config.json is no JSON object")
    (directory / "config.json").write_text('{"hidden_size": "wide"}')
    refused("the draft's config holds a wrong value")
    (directory / "config.json").unlink()
    refused("cannot read its config.json")
    assert bank.published() == 0
