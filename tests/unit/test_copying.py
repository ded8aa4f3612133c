"""When a proposal is replaced by a copy, and what is booked of it."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from aurora_vllm.control.copying import CopyChoice
from aurora_vllm.spec_decode.advisor import DraftLengthAdvisor
from aurora_vllm.spec_decode.copying import DraftCopier
from tests.unit.tiny_world import World, session


def request(tokens: list[int], prefill: bool = False, finished: bool = False) -> SimpleNamespace:
    return SimpleNamespace(all_token_ids=tokens, is_prefill_chunk=prefill, is_finished=lambda: finished)


def proposals(**drafts: list[int]) -> SimpleNamespace:
    return SimpleNamespace(req_ids=list(drafts), draft_token_ids=list(drafts.values()))


@pytest.mark.parametrize(("copies", "drafts", "wins"), [(0.8, 0.4, True), (0.3, 0.6, False)])
def test_the_better_one_is_chosen_by_match_length(copies: float, drafts: float, wins: bool) -> None:
    rng, choice = random.Random(0), CopyChoice(3, 10)
    for _ in range(300):
        choice.compare(4, rng.random() < copies, rng.random() < drafts)
        choice.compare(5, rng.random() < drafts, rng.random() < copies)
    assert choice.prefers_copy(4) == wins
    assert choice.prefers_copy(5) != wins


def test_a_turn_of_the_traffic_turns_the_choice() -> None:
    choice = CopyChoice(3, 10)
    for _ in range(5000):
        choice.compare(3, True, False)
    for _ in range(400):
        choice.compare(3, False, True)
    assert not choice.prefers_copy(3)


def test_a_copy_is_as_long_as_the_draft_it_replaces_and_replaces_none_where_nothing_is_drafted() -> None:
    copier, requests = DraftCopier(3), {"a": request([5, 6, 7, 8, 5, 6]), "b": request([1, 2, 3, 4])}
    for length in (3, 1, 0):
        arrived = proposals(a=[0] * length, b=[9] * length)
        copier.replace(arrived, requests)
        assert arrived.draft_token_ids == [[7, 8, 5][:length], [9] * length]
        assert copier.copied("a") == (length > 0)
        assert not copier.copied("b")
    copier.forget(["a"])
    assert not copier.copied("a")


@pytest.mark.parametrize("state", [{"prefill": True}, {"finished": True}])
def test_requests_that_are_not_decoding_are_left_alone(state: dict[str, bool]) -> None:
    copier, arrived = DraftCopier(2), proposals(a=[0, 0], gone=[0, 0])
    copier.replace(arrived, {"a": request([5, 6, 7, 5, 6], **state)})
    assert arrived.draft_token_ids == [[0, 0], [0, 0]]


def test_copies_that_are_wrong_where_drafts_are_right_end() -> None:
    """Both are judged by what is emitted, whichever was verified."""
    copier, tokens = DraftCopier(2), [5, 6, 7, 5, 6]
    requests = {"a": request(tokens)}
    seen = []
    for turn in range(6):
        arrived = proposals(a=[100 + turn, 0])
        copier.replace(arrived, requests)
        seen.append(copier.copied("a"))
        tokens += [100 + turn, 5, 6]  # the draft was right
    assert seen == [True, False, False, False, False, False]


@pytest.mark.parametrize("drafting", [True, False])
def test_what_copies_would_give_is_known_without_verifying_any(drafting: bool) -> None:
    """A text with period 4: each step of three copies would have given four tokens."""
    copier, tokens = DraftCopier(3), [1, 2, 3, 4] * 3
    requests = {"a": request(tokens)}
    for turn in range(400):
        copier.replace(proposals(a=[7, 7, 7] if drafting else []), requests)
        tokens.append(1 + turn % 4)
    shares = copier.choice.accepted_per_position()
    assert shares[0] > 0.85 and shares[-1] > 0.7  # each position has its own few misses beforehand
    noise, rng = list(range(50)), random.Random(1)
    requests["b"] = request(noise)
    for _ in range(3000):
        copier.replace(proposals(b=[]), requests)
        noise.append(rng.randrange(10_000))
    assert max(copier.choice.accepted_per_position()) < 0.1


def test_copied_verdicts_count_for_the_draft_length_and_for_no_version(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        requests = {"a": request([5, 6, 7, 5, 6]), "b": request([1, 2, 3])}
        advisor.drafts_arrived(proposals(a=[0, 0], b=[0, 0]), requests)
        advisor.verified(2, 2, "a")
        advisor.verified(2, 0, "b")
        scheduler = advisor._control.scheduler
        assert (scheduler.copied_drafts, scheduler.copied_tokens, scheduler.copied_accepted) == (1, 2, 2)
        assert [(row.num_drafts, row.num_accepted) for row in scheduler.acceptance()] == [(1, 0)]
        assert advisor._controller.acceptance._live.trials[0] > 1.5
        assert scheduler.copying == "on"


def test_a_fault_in_copying_leaves_the_drafts_as_they_are(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        broken = SimpleNamespace(is_finished=lambda: False, is_prefill_chunk=False)  # has no tokens
        arrived = proposals(a=[3, 4])
        advisor.drafts_arrived(arrived, {"a": broken})
        assert arrived.draft_token_ids == [[3, 4]]
        advisor.verified(2, 1, "a")
        assert "failed" in advisor._control.scheduler.copying
        assert advisor._control.scheduler.copied_drafts == 0


def test_where_copying_is_off_it_says_why(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = DraftLengthAdvisor(current, 2, no_copies="off by the settings")
        arrived = proposals(a=[0, 0])
        advisor.drafts_arrived(arrived, {"a": request([5, 6, 7, 5, 6])})
        assert arrived.draft_token_ids == [[0, 0]]
        assert advisor._control.scheduler.copying == "off by the settings"
