"""The V2 adapter on a runner of straw; on vLLM's own it is tested in tests/integration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.errors import AuroraError
from aurora_vllm.spec_decode.attachment import Attachment, find_adapter
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.model_runner import ModelRunner, choose_runner
from aurora_vllm.spec_decode.runner_v1 import V1Adapter
from aurora_vllm.spec_decode.runner_v2 import V2Adapter, emitted_tokens
from aurora_vllm.spec_decode.trace import StepTrace
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment
from tests.unit.tiny_world import World, session

REQUESTS, ROWS, WIDTH, DRAFTS = 2, 6, 4, 2


class StrawSpeculator:
    def __init__(self) -> None:
        self.draft_tokens = torch.zeros(8, DRAFTS, dtype=torch.int64)
        self.calls = 0

    def propose(
        self,
        input_batch: Any,
        aux_hidden_states: list[torch.Tensor] | None,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        self.calls += 1
        return self.draft_tokens[: input_batch.num_reqs].fill_(7)


class StrawRunner:
    """A request that verifies two drafts, and one inside its prompt or not."""

    def __init__(self) -> None:
        self.speculator = StrawSpeculator()
        self.sits_out = False

    def sample(self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> tuple[Any, Any, Any]:
        num_sampled = torch.tensor([2, 0])
        sampled = torch.tensor([[5, 6, 99], [98, 97, 96]])  # what lies behind num_sampled means nothing
        return SimpleNamespace(sampled_token_ids=sampled, num_sampled=num_sampled), num_sampled, 3 - num_sampled

    def get_model(self) -> None:
        raise SwapRefused("straw")

    get_draft_model = get_model


def batch(prefill: bool) -> SimpleNamespace:
    return SimpleNamespace(
        req_ids=["a", "b"],
        num_reqs=REQUESTS,
        num_tokens=ROWS,
        num_scheduled_tokens=np.array([3, 3]),
        num_draft_tokens_per_req=np.array([2, 0]),
        num_computed_tokens_np=np.array([10, 0]),
        prefill_len_np=np.array([9, 4 if prefill else 3]),
        has_prefill=prefill,
        input_ids=torch.arange(ROWS + 2),
        positions=torch.arange(ROWS + 2),
    )


@pytest.fixture
def hooked() -> tuple[StrawRunner, list[StepTrace]]:
    runner, seen = StrawRunner(), []

    def on_step(build: Callable[[], StepTrace]) -> None:
        assert runner.speculator.calls == 0  # the record is made before the draft runs
        seen.append(build())

    V2Adapter(runner, on_step, on_propose=lambda: 4, sits_out=lambda: runner.sits_out)
    return runner, seen


def test_a_step_becomes_a_trace(hooked: tuple[StrawRunner, list[StepTrace]]) -> None:
    runner, seen = hooked
    last, aux = torch.randn(ROWS, WIDTH), [torch.randn(ROWS, WIDTH)]
    runner.sample(last, batch(prefill=True), None)
    drafts = runner.speculator.propose(batch(prefill=True), aux_hidden_states=aux, num_speculative_tokens=2)
    assert drafts.tolist() == [[7, 7]] * REQUESTS
    (trace,) = seen
    assert (trace.request_ids, trace.lengths, trace.num_drafts) == (["a", "b"], [3, 3], [2, 0])
    assert trace.emits == [True, False]  # b is inside its prompt: 3 of 4 tokens
    assert trace.sampled.tolist() == [[5, 6, -1], [-1, -1, -1]]
    assert trace.token_ids.tolist() == trace.positions.tolist() == list(range(ROWS))
    assert trace.last_hidden_states is last and trace.aux_hidden_states == aux
    assert trace.draft_version == 4


@pytest.mark.parametrize(
    ("k", "prefill", "sits_out", "runs"),
    [
        *((0, False, False, 0), (0, True, False, 1), (1, False, False, 1), (2, False, False, 1)),
        *((0, False, True, 0), (0, True, True, 0), (1, True, True, 1)),
    ],
)
def test_a_step_that_nobody_drafts_from_does_without_the_draft_and_prompts_where_it_sits_out(
    hooked: tuple[StrawRunner, list[StepTrace]], k: int, prefill: bool, sits_out: bool, runs: int
) -> None:
    runner, seen = hooked
    runner.sits_out = sits_out
    runner.sample(torch.zeros(ROWS, WIDTH), batch(prefill), None)
    drafts = runner.speculator.propose(batch(prefill), None, num_speculative_tokens=k)
    assert runner.speculator.calls == runs
    assert drafts.shape == (REQUESTS, DRAFTS)
    assert runs or (drafts == -1).all()  # "no draft" to vLLM
    assert len(seen) == 1


@pytest.mark.parametrize("why", ["dummy_run", "is_profile"])
def test_vllms_own_dummies_are_no_traffic(hooked: tuple[StrawRunner, list[StepTrace]], why: str) -> None:
    runner, seen = hooked
    runner.speculator.propose(batch(False), None, num_speculative_tokens=0)  # nothing was sampled before it
    runner.sample(torch.zeros(ROWS, WIDTH), batch(False), None)
    runner.speculator.propose(batch(False), None, **{why: True})
    assert runner.speculator.calls == 2
    assert not seen


def rows_of(width: int) -> st.SearchStrategy[list[tuple[list[int], int]]]:
    tokens = st.lists(st.integers(0, 9), min_size=width, max_size=width)
    return st.lists(st.tuples(tokens, st.integers(0, width)), min_size=1)


@given(st.integers(1, 5).flatmap(rows_of))
def test_emitted_tokens_are_the_first_ones(rows: list[tuple[list[int], int]]) -> None:
    sampled, counts = torch.tensor([row for row, _ in rows]), torch.tensor([count for _, count in rows])
    expected = [row[:count] + [-1] * (len(row) - count) for row, count in rows]
    assert emitted_tokens(sampled, counts).tolist() == expected


def test_the_adapter_follows_from_what_the_runner_has() -> None:
    assert find_adapter(StrawRunner()) is V2Adapter
    assert find_adapter(SimpleNamespace(drafter=None, propose_draft_token_ids=None)) is V1Adapter
    assert find_adapter(SimpleNamespace(speculator=None, sample=None)) is None  # V2 without speculation
    assert find_adapter(SimpleNamespace()) is None


def test_an_unknown_runner_is_served_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with session(World(), tmp_path) as (current, _):
        monkeypatch.setenv("AURORA_SESSION", current.model_dump_json())
        assert Attachment.to_worker(SimpleNamespace(model_runner=SimpleNamespace())) is None
        why = "<class 'types.SimpleNamespace'> has neither the V1 runner's drafter nor the V2 runner's speculator"
        assert f"aurora: {why}; serving goes on as plain vLLM" in caplog.text
        told = ControlBlock.attach(Segment.attach(current.control)).worker
        assert told.message == f"could not attach: {why}" and not told.attached


def test_vllms_warm_up_requests_are_no_traffic(tmp_path: Path) -> None:
    params = SimpleNamespace(extra_args=None, temperature=0.0)
    new = SimpleNamespace(req_id="_warmup_0_", prompt_token_ids=[1, 2], sampling_params=params)
    step = SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=[new], total_num_scheduled_tokens=2)
    with session(World(), tmp_path) as (current, _):
        attachment = Attachment(current, StrawRunner(), V2Adapter)
        attachment.step_starts(step)  # type: ignore[arg-type]
        assert attachment.control.worker.requests_seen == 0
        attachment.start_serving()
        attachment.step_starts(step)  # type: ignore[arg-type]
        assert attachment.control.worker.requests_seen == 1


@pytest.mark.parametrize(
    ("said", "triton", "name", "reason"),
    [
        (None, True, "V2", "vLLM's default"),
        (None, False, "V1", "no Triton for this device"),
        ("0", True, "V1", "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("0", False, "V1", "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("1", True, "V2", "VLLM_USE_V2_MODEL_RUNNER=1"),
    ],
)
def test_which_runner_vllm_will_take(
    monkeypatch: pytest.MonkeyPatch, said: str | None, triton: bool, name: str, reason: str
) -> None:
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", triton)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if said is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", said)
    assert choose_runner() == ModelRunner(name, reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(("said", "says"), [("yes", "is 'yes'"), ("", "is ''"), ("1", "no Triton for this device")])
def test_a_runner_that_cannot_be(monkeypatch: pytest.MonkeyPatch, said: str, says: str) -> None:
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", said)
    with pytest.raises(AuroraError, match=says):
        choose_runner()
