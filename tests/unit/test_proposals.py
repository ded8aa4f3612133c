"""What becomes of proposals between the worker and vLLM's scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams

from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.proposals import Proposals, cut_to
from aurora_vllm.spec_decode.undrafted import Withdrawal, leave_out_drafts
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.segment import Segment
from tests.unit.tiny_world import World, session


@pytest.fixture
def control() -> Iterator[ControlBlock]:
    with Segment.create("control", control_bytes()) as segment:
        yield ControlBlock.create(segment)


def request(tokens: list[int], **params: Any) -> Any:
    return SimpleNamespace(
        sampling_params=SamplingParams(**params), all_token_ids=tokens, output_token_ids=tokens[1:],
        num_output_tokens=len(tokens) - 1, cache_salt=None, is_prefill_chunk=False, is_finished=lambda: False,
    )  # fmt: skip


def drafts(*tokens: list[int]) -> Any:
    return SimpleNamespace(req_ids=[str(i) for i in range(len(tokens))], draft_token_ids=list(tokens))


def whole(kind: int, copied: bool) -> int:
    return 8


def test_zeros_that_nobody_proposed_are_not_verified(control: ControlBlock) -> None:
    """Near the draft's longest context vLLM hands over zeros for all; a copy may still take their place."""
    proposals = Proposals(control, 8, 0)
    control.worker.step = control.worker.proposed_step = 4
    asked = drafts([9, 9], [8, 8])
    proposals.arrived(asked, {"0": request([1, 2, 3]), "1": request([5, 6, 7])}, whole)
    assert asked.draft_token_ids == [[9, 9], [8, 8]]
    control.worker.step = 5
    zeros = drafts([0] * 8, [0] * 8)
    proposals.arrived(zeros, {"0": request([1, 2, 3, 1, 2]), "1": request([5, 6, 7])}, whole)
    assert zeros.draft_token_ids == [[3, 1, 2, 3, 1, 2, 3, 1], []]


def test_zeros_are_no_evidence_against_a_version(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2, no_copies="not here")
        advisor._control.worker.step = 1
        zeros = drafts([0, 0])
        advisor.drafts_arrived(zeros, {"0": request([1, 2])})
        assert zeros.draft_token_ids == [[]]


def test_copying_says_that_it_is_on_again(control: ControlBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    proposals = Proposals(control, 8, 0)
    assert control.scheduler.copying == "on"
    replace = proposals._copier.replace  # type: ignore[union-attr]
    monkeypatch.setattr(proposals._copier, "replace", lambda *args: 1 / 0)
    proposals.arrived(drafts([1]), {"0": request([1])}, whole)
    assert control.scheduler.copying == "failed: ZeroDivisionError: division by zero"
    monkeypatch.setattr(proposals._copier, "replace", replace)
    for _ in range(9):  # answers are forgotten well in between, which says nothing of copying
        proposals.forget([])
    proposals.arrived(drafts([1]), {"0": request([1])}, whole)
    assert control.scheduler.copying == "on"
    proposals.arrived(asked := drafts([1], [2]), {"0": request([1]), "1": SimpleNamespace(sampling_params=None)}, whole)
    assert asked.draft_token_ids == [[], []]  # one that cannot be checked: nobody has drafts
    assert Proposals(control, 8, 0, no_copies="off").copies is None and control.scheduler.copying == "off"


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), st.integers(0, 60))
def test_a_step_has_room_for_every_request(proposed: list[list[int]], budget: int) -> None:
    before = [list(one) for one in proposed]
    cut_to(budget, proposed)
    assert all(one == was[: len(one)] for one, was in zip(proposed, before, strict=True))
    needed = len(before) + sum(map(len, before))
    if needed <= budget or not any(before):
        assert proposed == before
        return
    left = len(proposed) + sum(map(len, proposed))
    assert left <= max(budget, len(proposed))
    longest = max(map(len, proposed))
    cut = [i for i, was in enumerate(before) if len(proposed[i]) < len(was)]
    assert cut and all(len(proposed[i]) == longest for i in cut)  # nobody was cut below another
    assert left + len(cut) > budget  # one more for each of them would be too much


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8))
def test_drafts_end_before_min_tokens_are_reached(min_tokens: int, there: int, proposed: int) -> None:
    """The token behind the accepted drafts is one that vLLM judges by the tokens there were before them."""
    proposals = drafts(list(range(proposed)))
    leave_out_drafts(proposals, {"0": request([7] * (there + 1), min_tokens=min_tokens, max_tokens=99)})
    for accepted in range(len(proposals.draft_token_ids[0]) + 1):
        assert (there < min_tokens) == (there + accepted < min_tokens)
    kept = len(proposals.draft_token_ids[0])
    assert kept == proposed or there + kept + 1 == min_tokens  # and no sooner than they have to


def test_drafts_are_withdrawn_while_somebody_asks_for_the_logprobs_of_tokens() -> None:
    withdrawal, requests = Withdrawal(), {"plain": request([1]), "asks": request([1], logprob_token_ids=[3])}
    for name, one in requests.items():
        one.request_id, one.spec_token_ids = name, [1, 2]
    withdrawal.arrived(requests["plain"])
    withdrawal.withdraw(requests)
    assert requests["plain"].spec_token_ids == [1, 2]
    withdrawal.arrived(requests["asks"])
    withdrawal.withdraw(requests)
    assert requests["plain"].spec_token_ids == requests["asks"].spec_token_ids == []
    del requests["asks"]  # it has ended
    requests["plain"].spec_token_ids = [1]
    withdrawal.withdraw(requests)
    assert requests["plain"].spec_token_ids == [1]


def test_where_proposals_do_not_pass_by_each_request_that_goes_without_is_left_out() -> None:
    withdrawal = Withdrawal(one_by_one=True)
    requests = {"plain": request([1]), "seeded": request([1], temperature=0.7, seed=3)}
    for name, one in requests.items():
        one.request_id, one.spec_token_ids = name, [-1, -1]
        withdrawal.arrived(one)
    withdrawal.withdraw(requests)
    assert (requests["plain"].spec_token_ids, requests["seeded"].spec_token_ids) == ([-1, -1], [])
