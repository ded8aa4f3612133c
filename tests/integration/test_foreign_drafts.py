"""Drafts in other people's formats: vLLM loads the directory itself, and the learner computes what vLLM proposes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm.export import export
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import Eagle3Draft, load_config, load_draft, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from tests.integration import plain
from tests.integration.reference import Reference

V, ANSWER, PROMPTS, AUX_LAYERS = 64, 48, 24, (2, 4, 5)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of eight layers, not the model of the other tests."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, num_hidden_layers=8, vocab_size=V, max_position_embeddings=128, initializer_range=0.25,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def traffic(target: Path) -> list[Trajectory]:
    """What transformers answers, greedily, and its states. Each answer is longer than vLLM's by the drafts."""
    reference, head, done = Reference(target, AUX_LAYERS), load_target_head(target), []
    seeds = [torch.Generator().manual_seed(request) for request in range(PROMPTS)]
    tokens = torch.stack([torch.randint(V, (6,), generator=seed) for seed in seeds])
    while tokens.shape[1] < 6 + ANSWER + 4:
        tokens = torch.cat([tokens, head.argmax(reference.last_states(tokens)[:, -1])[:, None]], 1)
    for request, one in enumerate(tokens):
        aux, last = reference.states(one.tolist())
        done.append(Trajectory(request, 0, one.clone(), aux, last, 6, 1, 0.0))
    return done


def trained(
    target: Path, traffic: list[Trajectory], directory: Path, **options: Any
) -> tuple[Eagle3Draft, dict[str, Any]]:
    """A draft that knows the traffic; every norm says something."""
    config = load_config(make_day0_draft(target, directory / "day0", 48)) | options
    draft = Eagle3Draft(Eagle3Config.from_hf(config))
    draft.load_state_dict(load_draft(directory / "day0").state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "_norm" in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    trainer = Trainer(draft, load_target_head(target), 3e-3, ttt_length=3, matmul_dtype=torch.float32)
    for step in range(100):
        trainer.step(collate(traffic[step % 3 :: 3]))
    return draft, config


def as_yuhuili(target: Path, traffic: list[Trajectory], directory: Path) -> Path:
    draft, config = trained(target, traffic, directory)
    save_draft(draft, directory / "out", config)
    torch.save(load_file(directory / "out" / "model.safetensors"), directory / "out" / "pytorch_model.bin")
    (directory / "out" / "model.safetensors").unlink()
    return directory / "out"


def as_speculators_with_a_qwen3_layer(target: Path, traffic: list[Trajectory], directory: Path) -> Path:
    options = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3", "norm_before_residual": True}
    draft, config = trained(target, traffic, directory, **options, fc_norm=True)
    save_draft(draft, directory / "draft", config)
    export(directory / "draft", directory / "out", "speculators", str(target))
    return directory / "out"


def acceptance(draft: Eagle3Draft, target: Path, traffic: list[Trajectory]) -> float:
    """As the learner predicts it for the tokens vLLM serves."""
    head = load_target_head(target)
    return sum((simulate(draft, head, one, 3) for one in traffic), Score(0, (0, 0, 0))).acceptance_length


FORMATS = (as_yuhuili, as_speculators_with_a_qwen3_layer)


def arguments(target: Path, draft: Path) -> dict[str, Any]:
    """Of vllm.LLM."""
    return {
        "model": str(target),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "block_size": 32,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 16 << 20,
        "speculative_config": {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3},
    }


@pytest.fixture(scope="module")
def drafts(
    target: Path, traffic: list[Trajectory], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, tuple[Path, dict[str, Any]]]:
    """Of each format a draft, and what vLLM made of it."""
    written = [write(target, traffic, tmp_path_factory.mktemp(write.__name__)) for write in FORMATS]
    prompts = [one.token_ids[:6].tolist() for one in traffic]
    found = plain.serve([arguments(target, directory) for directory in written], prompts, ANSWER)
    return dict(zip(FORMATS, zip(written, found, strict=True), strict=True))


@pytest.mark.parametrize("write", FORMATS)
def test_vllm_accepts_what_the_learner_predicts(
    write: Any, target: Path, traffic: list[Trajectory], drafts: dict[Any, tuple[Path, dict[str, Any]]]
) -> None:
    directory, found = drafts[write]
    draft = load_draft(directory)
    predicted = acceptance(draft, target, traffic)
    assert found["tokens"] == [one.token_ids[6 : 6 + ANSWER].tolist() for one in traffic]
    served = 1 + found["accepted"] / found["drafts"]
    print(f"{write.__name__}: predicted {predicted:.3f}, served {served:.3f}, {found['drafts']} verifications")
    assert served > 1.3
    assert served == pytest.approx(predicted, abs=0.03)
    if draft.config.qk_norm:  # a check of the check: it sees the head norms
        with torch.no_grad():
            draft.midlayer.self_attn.q_norm.weight.fill_(1.0)
            draft.midlayer.self_attn.k_norm.weight.fill_(1.0)
        assert acceptance(draft, target, traffic) < predicted - 0.1
