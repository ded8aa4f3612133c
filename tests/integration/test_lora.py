"""LoRA adapters beside drafts, in a real vLLM: they are the target's, and a draft that runs several passes reads plain
embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.integration.remote import RemoteEngine
from tests.integration.served import TINY_VOCABULARY, write_tiny_target

if TYPE_CHECKING:
    from benchmarks.engine import Engine

RANK = 4
LAYERS = 4
PROMPTS = [[5, 6, 7, 8, 5, 6], [20, 21], [9] * 5, [30, 31, 32, 30, 31]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    directory = tmp_path_factory.mktemp("lora")
    made = RemoteEngine.launch(
        write_tiny_target(directory / "target"),
        directory,
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        skip_tokenizer_init=True,
        draft_vocab_size=TINY_VOCABULARY - 32,
        enable_lora=True,
        max_lora_rank=8,
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the output projections, random and strong enough to change answers."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        tensors |= {f"{name}.lora_A.weight": torch.randn(RANK, 64), f"{name}.lora_B.weight": torch.randn(64, RANK)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["o_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def answer(engine: Engine, adapter: str, mode: str) -> tuple[list[list[int]], list[list[int]], int]:
    """Answers of the model and of the adapter, and how many drafts were verified for them.

    One after the other: on a CPU vLLM 0.32 gives a request without an adapter that of another one in its batch
    (``vllm/lora/ops/torch_ops/lora_ops.py`` selects by index -1), with and without drafts.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    before = engine.spec_decode_counters()["drafts"]
    found = []
    with engine.draft_length(mode):
        for lora in (None, LoRARequest("adapter", 1, adapter)):
            done = engine.llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
            found.append([list(one.outputs[0].token_ids) for one in done])
    return found[0], found[1], engine.spec_decode_counters()["drafts"] - before


def test_drafts_change_no_answer_of_the_model_or_of_an_adapter(engine: RemoteEngine, adapter: Path) -> None:
    plain, adapted, verified = engine.run(answer, str(adapter), "never")
    assert verified == 0
    assert all(one != other for one, other in zip(plain, adapted, strict=True))
    drafted, drafted_adapted, verified = engine.run(answer, str(adapter), "always")
    assert verified > 2 * len(PROMPTS)
    assert (drafted, drafted_adapted) == (plain, adapted)
