from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.spec_decode.sampling_fix import (
    expand_batch_to_tokens,
    loses_its_output,
    sample_plainly_without_drafts,
)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 4)), min_size=1, max_size=8))
def test_expands_each_request_over_its_tokens(requests: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in requests])
    cumulative = torch.tensor([count for _, count in requests], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    got = expand_batch_to_tokens(values, cumulative, int(cumulative[-1]), replace_from=0, replace_to=1)
    expected = [value or 1.0 for value, count in requests for _ in range(count)]
    assert torch.allclose(got, torch.tensor(expected))


def test_probe_tells_a_working_function_from_one_that_loses_its_output() -> None:
    assert not loses_its_output(expand_batch_to_tokens)
    assert loses_its_output(lambda x, cu, n, replace_from, replace_to: torch.full((n,), 0.25))


def test_a_step_without_drafts_keeps_to_each_requests_thinking_budget() -> None:
    """vLLM's own sampler and its state of thinking; token 5 begins it, 6 ends it, 7 is what the target says."""
    budgets = pytest.importorskip("vllm.v1.sample.thinking_budget_state")
    from vllm.platforms import current_platform
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    current_platform.import_kernels()
    words = SimpleNamespace(reasoning_start_token_ids=[5], reasoning_end_token_ids=[6])
    state = budgets.ThinkingBudgetStateHolder(words, 4, 8, torch.device("cpu"), False)
    out: list[list[int]] = [[], []]
    added = [
        (0, SimpleNamespace(thinking_token_budget=None), [1, 2], out[0]),
        (1, SimpleNamespace(thinking_token_budget=3), [1, 5], out[1]),
    ]
    state.sync_batch(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    zeros = torch.zeros(2)
    metadata = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=None, logprob_token_ids=None, prompt_token_ids=None, frequency_penalties=zeros,
        presence_penalties=zeros, repetition_penalties=zeros + 1, output_token_ids=out, spec_token_ids=[[], []],
        no_penalties=True, allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors([]),
        thinking_budget_state_holder=state,
    )  # fmt: skip
    runner: Any = SimpleNamespace(
        sampler=Sampler(), _sample=lambda logits, drafts: pytest.fail("there are none"),
        input_batch=SimpleNamespace(sampling_metadata=metadata, update_async_output_token_ids=lambda: None),
    )  # fmt: skip
    sample_plainly_without_drafts(runner)
    for _ in range(8):
        logits = torch.zeros(2, 10)
        logits[:, 7] = 1
        for i, token in enumerate(runner._sample(logits, None).sampled_token_ids[:, 0].tolist()):
            out[i].append(token)
    assert out == [[7] * 8, [7, 7, 7, 6, 7, 7, 7, 7]]
