"""Drafts of other people: yuhuili's pickles, speculators' names and nested config, Qwen3 layers; what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm import checkpoint
from aurora_vllm.checkpoint import Target
from aurora_vllm.errors import AuroraError
from aurora_vllm.export import speculators_config
from aurora_vllm.learner.draft import Eagle3Draft, load_draft, save_draft
from aurora_vllm.learner.draft_files import flatten, read_tensors
from aurora_vllm.learner.eagle3_config import Eagle3Config
from tests.unit.tiny_world import DRAFT, LAYERS, H, V, World

TARGET = Target("owner/tiny", Path("/t"), H, LAYERS, V, "float32")
QWEN3 = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}


def as_yuhuili(directory: Path, **options: Any) -> Eagle3Draft:
    """As huggingface.co/yuhuili: pytorch_model.bin, no embedding, no auxiliary layer ids."""
    draft, config = World().draft(**options), {**DRAFT, **options}
    save_draft(draft, directory, config)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    (directory / "training_args.bin").write_bytes(b"not weights")
    return draft


def as_speculators(directory: Path, **options: Any) -> Eagle3Draft:
    """As speculators writes it: nested config, layers.0, an embedding of its own (which is the target's)."""
    draft, config = World().draft(**options), {**DRAFT, **options}
    draft.embed_tokens = World().embedding
    save_draft(draft, directory, config)
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    verifier = {"name_or_path": "owner/tiny", "architectures": ["LlamaForCausalLM"]}
    described = speculators_config(draft.config, config, verifier, 3)
    (directory / "config.json").write_text(json.dumps(described))
    return draft


@pytest.mark.parametrize("write", [as_yuhuili, as_speculators])
@pytest.mark.parametrize(
    "options", [{}, QWEN3, {"norm_before_residual": True}, {"norm_before_fc": True}, {"fc_norm": True}], ids=str
)
def test_every_format_is_the_same_draft(tmp_path: Path, write: Any, options: dict[str, Any]) -> None:
    draft = write(tmp_path, **options)
    again = load_draft(tmp_path)
    assert again.config == draft.config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.embed_tokens is None) == (draft.embed_tokens is None)
    found = checkpoint.read_draft(tmp_path, TARGET)
    assert (found.aux_layers, found.vocab_size) == ((2, 4, 5), 30)
    assert {spec.name: spec.shape for spec in found.specs} == {n: tuple(t.shape) for n, t in draft.state_dict().items()}


def test_qwen3_layers_have_head_norms() -> None:
    names = set(World().draft(**QWEN3).state_dict())
    assert {"midlayer.self_attn.q_norm.weight", "midlayer.self_attn.k_norm.weight"} < names
    multimodal = Eagle3Config.from_hf(DRAFT | {"architectures": ["Eagle3Qwen3vlForCausalLM"]})
    assert not multimodal.qk_norm  # vLLM maps it to the Llama layer


@pytest.mark.parametrize("write", [as_yuhuili, as_speculators])
@pytest.mark.parametrize(
    ("target", "line"),
    [
        ({"hidden_size": 48}, r"its (target_)?hidden_size is 32, the target's is 48"),
        ({"vocab_size": 99}, "its vocab_size is 32, the target's is 99"),
    ],
)
def test_another_targets_draft_is_refused(tmp_path: Path, write: Any, target: dict[str, int], line: str) -> None:
    write(tmp_path)
    with pytest.raises(AuroraError, match=line):
        checkpoint.read_draft(tmp_path, Target(**{**vars(TARGET), **target}))


def test_a_tensor_that_does_not_fit_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    as_yuhuili(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    tensors = torch.load(file)
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:]
    torch.save(tensors, file)
    with pytest.raises(AuroraError, match=r"tensor fc\.weight is \[32, 95\], it should be \[32, 96\]"):
        checkpoint.read_draft(tmp_path, TARGET)


def test_a_verifiers_tensor_is_refused_as_vllm_would(tmp_path: Path) -> None:
    as_speculators(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"verifier_norm.weight": torch.ones(H)}, file)
    with pytest.raises(AuroraError, match=r"has a tensor verifier_norm\.weight \[32\]"):
        checkpoint.read_draft(tmp_path, TARGET)


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/tmp/aurora-vllm-evil", "w"))


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", b"PK\x03\x04cut short", b"text"])
def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path: Path, content: bytes) -> None:
    as_yuhuili(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for device in ("cpu", "meta"):
        with pytest.raises(AuroraError, match=r"pytorch_model\.bin cannot be read"):
            read_tensors(tmp_path, device)
    assert not Path("/tmp/aurora-vllm-evil").exists()


def test_a_pickled_object_in_a_pickle_of_tensors_is_refused(tmp_path: Path) -> None:
    as_yuhuili(tmp_path)
    torch.save({"fc.weight": torch.zeros(2), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AuroraError, match="more than tensors in it"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"speculators_model_type": "dflash"}, "is a speculator of type 'dflash'; Aurora trains EAGLE-3"),
        ({"transformer_layer_config": {"model_type": "gemma"}}, "layer is of type 'gemma'; vLLM knows llama, qwen3"),
    ],
)
def test_other_speculators_are_refused(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    as_speculators(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AuroraError, match=line):
        load_draft(tmp_path)
    with pytest.raises(AuroraError, match=line):
        checkpoint.read_draft(tmp_path, TARGET)


def test_what_speculators_leaves_out_is_transformers_default() -> None:
    """speculators writes ``to_diff_dict``: a layer of Llama's default sizes is written without them."""
    layer = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 128256}
    flat = flatten({"speculators_model_type": "eagle3", "transformer_layer_config": layer, "draft_vocab_size": 9})
    config = Eagle3Config.from_hf(flat)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (4096, 32, 128)
    assert config.norm_before_residual  # vLLM's default in this format, and only in this one
    assert not Eagle3Config.from_hf(DRAFT).norm_before_residual


def test_a_flat_config_is_left_alone() -> None:
    assert flatten(DRAFT) is DRAFT


def test_vllm_reads_the_nested_config_the_same_way(tmp_path: Path) -> None:
    """update_eagle3, the function vLLM itself calls, sets what we set."""
    algos = pytest.importorskip("vllm.transformers_utils.configs.speculators.algos")
    as_speculators(tmp_path, norm_before_residual=True, fc_norm=True)
    config = json.loads((tmp_path / "config.json").read_text())
    flat = flatten(json.loads(json.dumps(config)))
    theirs = dict(config["transformer_layer_config"])
    algos.update_eagle3(config_dict=config, pre_trained_config=theirs)
    differing = {key: (value, flat.get(key)) for key, value in theirs.items() if flat.get(key) != value}
    assert not differing
