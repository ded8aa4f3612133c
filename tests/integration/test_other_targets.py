"""Targets whose layer a day-0 draft cannot take over, a mixture of experts and a quantized one: captured, learned from,
and served with what was learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from tests.integration.remote import RemoteEngine
from tests.integration.served import TINY_VOCABULARY, write_tiny_target

ANSWER, PROMPT = 40, 6


def mixture_of_experts(directory: Path) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=TINY_VOCABULARY,
        max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def quantized(directory: Path) -> Path:
    """Eight-bit weights and activations, in the format of compressed-tensors."""
    write_tiny_target(directory)
    file, tensors = directory / "model.safetensors", {}
    for name, weight in load_file(file).items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors |= {name: (weight / scale).round().to(torch.int8), name + "_scale": scale}
        else:
            tensors[name] = weight
    save_file(tensors, file, metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=[mixture_of_experts, quantized])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    directory = tmp_path_factory.mktemp("other")
    target = request.param(directory / "target")
    made = RemoteEngine.launch(
        target,
        directory,
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        skip_tokenizer_init=True,
        draft_vocab_size=TINY_VOCABULARY - 32,
    )
    yield made
    made.close()


def answers(engine: RemoteEngine, prompts: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate(prompts, max_tokens=ANSWER, detokenize=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def accepted(engine: RemoteEngine, prompts: list[list[int]]) -> tuple[int, list[list[int]]]:
    """Accepted drafts, and the answers."""
    before = engine.spec_decode_counters().get("accepted_tokens", 0)
    found = answers(engine, prompts)
    return engine.spec_decode_counters()["accepted_tokens"] - before, found


def learned(engine: RemoteEngine, traffic: list[Trajectory]) -> dict[str, torch.Tensor]:
    draft = load_draft(engine.session.draft)
    trainer = Trainer(draft, load_target_head(engine.session.target), 3e-3, ttt_length=3, matmul_dtype=torch.float32)
    for step in range(80):
        trainer.step(collate(traffic[step % 3 :: 3]))
    return bank_tensors(draft)


def test_a_draft_that_starts_silent_learns_and_goes_live(engine: RemoteEngine) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(TINY_VOCABULARY, (18, PROMPT), generator=generator).tolist()
    with engine.draft_length("never"):
        without = answers(engine, prompts)
    engine.let_requests_end()
    traffic = list(Assembler(engine.session.row_layout).feed(engine.drain()))
    assert len(traffic) == len(prompts)
    head = load_target_head(engine.session.target)
    for one in traffic:
        said = head.argmax(one.last[PROMPT - 1 : -1])  # what the captured states mean is what was answered
        assert torch.equal(said, one.token_ids[PROMPT:])
        assert one.token_ids[PROMPT:].tolist() in [answer[: len(said)] for answer in without]

    at_first, drafted = accepted(engine, prompts)
    assert drafted == without
    engine.bank.publish(2, learned(engine, traffic), {"why": "test"})
    engine.wait_for(lambda: engine.control.worker.staged_version == 2)
    then, drafted = accepted(engine, prompts)
    assert engine.control.worker.live_version == 2
    assert drafted == without
    print(f"accepted drafts: {at_first} at first, {then} when it had learned")
    assert then > max(1.2 * at_first, 100)  # such random models repeat themselves, so even the first guesses are good
