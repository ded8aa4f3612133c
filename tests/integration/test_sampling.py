"""Speculative sampling draws from the target's own distribution: chi-square against exact probabilities."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.served import write_tiny_target

VOCABULARY = 32
PROMPT = [5, 17, 3, 9, 11, 2]
SAMPLES = 3000


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 32 tokens with a distribution that is neither flat nor a single spike."""
    directory = tmp_path_factory.mktemp("tiny")
    return write_tiny_target(directory, vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.15)


@pytest.fixture(scope="session")  # shutting it down takes vLLM's process groups from the shared engine, too
def llm(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm import LLM

    from aurora_vllm.learner.day0 import make_day0_draft

    draft = make_day0_draft(tiny_target, tmp_path_factory.mktemp("tiny-draft") / "draft", 24)
    before = {name: os.environ.pop(name, None) for name in ("AURORA_SESSION", "VLLM_ENABLE_V1_MULTIPROCESSING")}
    made = LLM(
        model=str(tiny_target),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=64,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=False,
        seed=0,
        worker_cls="tests.integration.worker.InspectableWorker",
        speculative_config={"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3},
    )
    yield made
    made.llm_engine.engine_core.shutdown()
    os.environ.update({name: value for name, value in before.items() if value is not None})


@torch.inference_mode()
def exact_second_token(target: Path, temperature: float, top_k: int) -> torch.Tensor:
    """P(second sampled token), the first one summed out. float64 [VOCABULARY]"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()

    def probabilities(contexts: torch.Tensor) -> torch.Tensor:
        logits = model(contexts).logits[:, -1] / temperature
        if top_k:
            threshold = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        return logits.softmax(-1)

    prompt = torch.tensor([PROMPT])
    first = probabilities(prompt)[0]
    extended = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    return first @ probabilities(extended)


def sampled_second_tokens(llm: Any, temperature: float, top_k: int) -> torch.Tensor:
    """How often each token came second. float64 [VOCABULARY]"""
    from vllm import SamplingParams

    # Three tokens: the second comes out of the rejection sampler, not out of the prefill.
    params = SamplingParams(temperature=temperature, top_k=top_k, max_tokens=3, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * SAMPLES, params, use_tqdm=False)
    second = torch.tensor([output.outputs[0].token_ids[1] for output in outputs])
    return torch.bincount(second, minlength=VOCABULARY).double()


def p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are pooled."""
    expected = probabilities * observed.sum()
    rare = expected < 5
    if bool(rare.any()):
        if observed[rare].sum() > 0 and expected[rare].sum() < 1e-9:
            return 0.0  # a token that cannot occur did
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def acceptance(llm: Any) -> tuple[int, int]:
    values = {metric.name: metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")}
    return (
        values["vllm:spec_decode_num_draft_tokens"].value,
        values["vllm:spec_decode_num_accepted_tokens"].value,
    )


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.3, 6)])
def test_sampling_is_lossless(llm: Any, tiny_target: Path, temperature: float, top_k: int) -> None:
    drafted, accepted = acceptance(llm)
    p = p_value(sampled_second_tokens(llm, temperature, top_k), exact_second_token(tiny_target, temperature, top_k))
    assert p > 1e-3
    more_drafted, more_accepted = acceptance(llm)
    assert 0 < more_accepted - accepted < more_drafted - drafted, "both verdicts must have occurred"


def test_the_test_sees_vllms_bug(llm: Any, tiny_target: Path) -> None:
    """Negative control: vLLM's own function back in place. Once this fails, upstream is mended (vllm#55005)."""
    llm.collective_rpc("unmend_sampling")
    try:
        p = p_value(sampled_second_tokens(llm, 0.5, 0), exact_second_token(tiny_target, 0.5, 0))
    finally:
        llm.collective_rpc("mend_sampling")
    assert p < 1e-6


def test_the_test_sees_a_slightly_wrong_temperature(llm: Any, tiny_target: Path) -> None:
    assert p_value(sampled_second_tokens(llm, 0.8, 0), exact_second_token(tiny_target, 1.0, 0)) < 1e-3
