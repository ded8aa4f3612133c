"""Requests that are answered without drafts: which they are, what becomes of their proposals, and who samples them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.undrafted import (
    accept_requests,
    add_logits_processors,
    goes_without_drafts,
    leave_out_drafts,
)
from tests.unit.tiny_world import World, session

PLAIN = SamplingParams(temperature=0.7, top_p=0.9, top_k=5)
SEEDED = SamplingParams(temperature=0.7, seed=3)


@pytest.mark.parametrize(
    ("params", "without"),
    [
        (PLAIN, False),
        (SamplingParams(temperature=0), False),
        (SamplingParams(temperature=0, seed=3), False),  # greedy: no random number is drawn
        (SamplingParams(temperature=0, min_p=0.1), False),
        (SEEDED, True),
        (SamplingParams(temperature=0.7, min_p=0.1), True),
        (SamplingParams(temperature=0, logit_bias={3: -1.0}), True),
        (SamplingParams(temperature=0, thinking_token_budget=0), True),
    ],
)
def test_which_requests_go_without_drafts(params: SamplingParams, without: bool) -> None:
    assert goes_without_drafts(params) == without


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=3)), max_size=6))
def test_only_their_proposals_are_emptied(rows: list[tuple[bool, list[int]]]) -> None:
    names = [str(i) for i in range(len(rows))]
    proposals = SimpleNamespace(req_ids=names, draft_token_ids=[list(tokens) for _, tokens in rows])
    requests = {
        name: SimpleNamespace(sampling_params=SEEDED if seeded else PLAIN, num_output_tokens=0)
        for name, (seeded, _) in zip(names, rows, strict=True)
    }
    assert leave_out_drafts(proposals, requests) == (len(rows) > 0 and all(seeded for seeded, _ in rows))
    assert proposals.draft_token_ids == [[] if seeded else tokens for seeded, tokens in rows]


def test_where_nobody_takes_drafts_none_are_made(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2, no_copies="not here")
        assert advisor.draft_length(2) == 2
        requests: dict[str, Any] = {"a": SimpleNamespace(sampling_params=SEEDED)}
        advisor.drafts_arrived(SimpleNamespace(req_ids=["a"], draft_token_ids=[[1, 2]]), requests)
        assert advisor.draft_length(1) == 0
        requests["b"] = SimpleNamespace(sampling_params=PLAIN, num_output_tokens=0)
        advisor.drafts_arrived(SimpleNamespace(req_ids=["a", "b"], draft_token_ids=[[], []]), requests)
        assert advisor.draft_length(2) == 2


def test_a_runner_gets_the_processors_that_vllm_left_out() -> None:
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    cpu = torch.device("cpu")
    processors = LogitsProcessors([MinTokensLogitsProcessor(config, cpu, False)])
    runner = SimpleNamespace(vllm_config=config, device=cpu, input_batch=SimpleNamespace(logitsprocs=processors))
    for _ in range(2):  # the second time they are there
        add_logits_processors(runner)
        assert [type(one).__name__ for one in processors.argmax_invariant] == ["MinPLogitsProcessor"]
        assert [type(one).__name__ for one in processors.non_argmax_invariant] == [
            "MinTokensLogitsProcessor",
            "LogitBiasLogitsProcessor",
        ]


def test_vllms_refusal_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = SamplingParams._validate_spec_decode
    monkeypatch.setattr(SamplingParams, "_validate_spec_decode", refuse)  # so that it is put back
    biased, speculates = SamplingParams(logit_bias={3: 1.0}), object()
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        biased._validate_spec_decode(speculates)
    accept_requests()
    biased._validate_spec_decode(speculates)
