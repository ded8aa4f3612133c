"""When a proposal is replaced by a copy, and what is booked of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_vllm.control.copying import Copies
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.copying import DraftCopier
from aurora_vllm.spec_decode.prompt_lookup import KINDS
from aurora_vllm.spec_decode.text_index import LONGEST_MATCH, Agreement
from tests.unit.tiny_world import World, session


def request(
    tokens: list[int],
    prefill: bool = False,
    finished: bool = False,
    salt: str | None = None,
    temperature: float = 0.0,
    **extra: object,
) -> SimpleNamespace:
    return SimpleNamespace(
        all_token_ids=tokens,
        output_token_ids=tokens,
        num_output_tokens=len(tokens),
        is_prefill_chunk=prefill,
        is_finished=lambda: finished,
        cache_salt=salt,
        sampling_params=SimpleNamespace(
            temperature=temperature, extra_args=extra, min_p=0.0, logit_bias=None, seed=None, min_tokens=0
        ),
    )


def proposals(**drafts: list[int]) -> SimpleNamespace:
    return SimpleNamespace(req_ids=list(drafts), draft_token_ids=list(drafts.values()))


def own(match: int, agreement: Agreement = Agreement.ALONE) -> int:
    return KINDS.number(match, from_others=False, is_sampled=False, agreement=agreement)


PERIODIC = own(LONGEST_MATCH, Agreement.AGREED)  # of copies in a text that repeats a phrase again and again


def others(match: int) -> int:
    return KINDS.number(match, from_others=True, is_sampled=False)


def whole(length: int) -> Callable[[int, bool], int]:
    return lambda kind, copied: length


@pytest.mark.parametrize(("copied", "drafted", "wins"), [(0.8, 0.4, True), (0.3, 0.6, False)])
def test_the_better_one_is_chosen_by_kind(copied: float, drafted: float, wins: bool) -> None:
    rng, copies = random.Random(0), Copies(3, KINDS.usual)
    for _ in range(300):
        copies.compare(4, rng.random() < copied, rng.random() < drafted)
        copies.compare(5, rng.random() < drafted, rng.random() < copied)
    assert copies.preferred(4) == wins
    assert copies.preferred(5) != wins
    assert not copies.preferred(0)  # there is nothing to copy


def test_a_turn_of_the_traffic_turns_the_choice() -> None:
    copies = Copies(3, KINDS.usual)
    for _ in range(5000):
        copies.compare(3, True, False)
    for _ in range(400):
        copies.compare(3, False, True)
    assert not copies.preferred(3)


def test_what_is_not_known_of_a_kind_is_what_is_usual() -> None:
    copies = Copies(2, KINDS.usual)
    assert copies.chain(own(1))[0] < 0.4 and copies.chain(own(1)) == copies.chain(others(1))
    assert copies.chain(own(8)) == pytest.approx([0.8, 0.64])
    for _ in range(50):
        copies.simulate(own(3), 2, 2)
        copies.simulate(own(8), 2, 0)
    assert copies.chain(own(3))[0] > 0.9 and copies.chain(own(8))[0] < 0.2
    for _ in range(6):
        copies.doubt()
    assert all(copies.chain(own(match))[0] < 0.4 for match in range(1, LONGEST_MATCH + 1))


def test_shares_are_those_of_what_was_seen() -> None:
    copies = Copies(2, KINDS.usual)
    assert list(copies.shares()) == [(0, 1.0)]
    copies.seen(3)
    copies.seen(0)
    assert [kind for kind, _ in copies.shares()] == [0, 3]
    assert sum(share for _, share in copies.shares()) == pytest.approx(1.0)


@pytest.mark.parametrize("length", [3, 1, 0])
def test_a_proposal_is_as_long_as_it_is_worth(length: int) -> None:
    copier, requests = DraftCopier(3), {"a": request([5, 6, 7, 8, 5, 6]), "b": request([1, 2, 3, 4])}
    asked: list[tuple[int, bool]] = []
    arrived = proposals(a=[], b=[9, 9])
    copier.replace(arrived, requests, lambda *row: asked.append(row) or length)
    assert arrived.draft_token_ids == [[7, 8, 5][:length], [9, 9][:length]]
    assert asked == [(own(2), True), (0, False)]
    assert copier.copied("a") and not copier.copied("b")
    copier.forget(["a"])
    assert not copier.copied("a")


@pytest.mark.parametrize("state", [{"prefill": True}, {"finished": True}])
def test_requests_that_are_not_decoding_are_left_alone(state: dict[str, bool]) -> None:
    copier, arrived = DraftCopier(2), proposals(a=[0, 0], gone=[0, 0])
    copier.replace(arrived, {"a": request([5, 6, 7, 5, 6], **state)}, whole(2))
    assert arrived.draft_token_ids == [[0, 0], [0, 0]]


def test_copies_that_are_wrong_where_drafts_are_right_end() -> None:
    """Both are judged by what is emitted, whichever was verified."""
    copier, tokens = DraftCopier(2), [5, 6, 7, 5, 6]
    requests = {"a": request(tokens)}
    seen = []
    for turn in range(6):
        arrived = proposals(a=[100 + turn, 0])
        copier.replace(arrived, requests, whole(2))
        seen.append(copier.copied("a"))
        tokens += [100 + turn, 5, 6]  # the draft was right
    # Each kind is tried once: first there is one occurrence, then several, and different tokens followed them.
    assert seen == [True, True, False, False, False, False]
    arrived = proposals(a=[])  # K is 0: there is nothing that has been right more often
    copier.replace(arrived, requests, whole(2))
    assert copier.copied("a") and len(arrived.draft_token_ids[0]) == 2


@pytest.mark.parametrize("drafting", [True, False])
def test_what_copies_would_give_is_known_without_verifying_any(drafting: bool) -> None:
    """A text with period 4: each step of three copies would have given four tokens."""
    copier, tokens = DraftCopier(3), [1, 2, 3, 4] * 3
    requests = {"a": request(tokens)}
    for turn in range(400):
        copier.replace(proposals(a=[7, 7, 7] if drafting else []), requests, whole(0))
        tokens.append(1 + turn % 4)
    assert min(copier.copies.chain(PERIODIC)) > 0.8
    noise, rng = list(range(50)), random.Random(1)
    requests = {"b": request(noise)}
    for _ in range(3000):
        copier.replace(proposals(b=[]), requests, whole(0))
        noise.append(rng.randrange(100))
    assert max(copier.copies.chain(own(2))) < 0.1 and min(copier.copies.chain(PERIODIC)) > 0.8
    for _ in range(3000):
        copier.replace(proposals(b=[]), requests, whole(0))
        noise.append(rng.randrange(5000))  # of so many, some are new
    assert max(copier.copies.chain(own(1))) < 0.1
    unmatched = dict(copier.copies.shares())[0]
    assert 0.5 < unmatched < 0.9


def test_the_copy_of_every_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed to its end one after the other, copies that are right would count more seldom than those that fail."""
    copier, tokens, counted = DraftCopier(8), [1, 2, 3, 4] * 4, list[int]()
    monkeypatch.setattr(copier.copies, "simulate", lambda kind, drafts, accepted: counted.append(accepted))
    for step in range(40):
        copier.replace(proposals(a=[]), {"a": request(tokens)}, whole(1))
        tokens.append(1 + step % 4)
    assert counted == [8] * (40 - 1 - 8)  # the last ones are not over yet


def test_what_sampled_requests_accept_says_nothing_of_greedy_ones() -> None:
    copier = DraftCopier(3)
    greedy, sampled, rng = [1, 2, 3, 4] * 3, [1, 2, 3, 4] * 3, random.Random(0)
    requests = {"g": request(greedy), "s": request(sampled, temperature=1.0)}
    for turn in range(400):
        copier.replace(proposals(g=[], s=[]), requests, whole(0))
        greedy.append(1 + turn % 4)
        sampled.append(1 + turn % 4 if rng.random() < 0.5 else rng.randrange(5, 99))
    likely = {kind: copier.copies.chain(kind)[0] for kind, _ in copier.copies.shares() if kind}
    assert likely[PERIODIC] > 0.9
    of_sampled = set(range(KINDS.number(1, False, is_sampled=True), KINDS.count))
    known = [kind for kind, share in copier.copies.shares() if kind in of_sampled and share > 0.02]  # not by luck
    assert len(known) > 2 and 0.3 < max(likely[kind] for kind in known) < 0.7


def ask(copier: DraftCopier, name: str, asked: SimpleNamespace) -> list[int]:
    arrived = proposals(**{name: [0, 0]})
    copier.replace(arrived, {name: asked}, whole(2))
    return arrived.draft_token_ids[0]


def test_an_answer_that_ended_is_copied_for_others() -> None:
    copier = DraftCopier(2, answers=100)
    answered = request([5, 6, 7, 8])
    ask(copier, "a", answered)
    answered.output_token_ids = [5, 6, 7, 8, 9]  # the last step's tokens are in it
    assert ask(copier, "b", request([1, 7, 8])) == [0, 0]  # not while it is being written
    copier.forget(["a"])
    assert ask(copier, "c", request([1, 5, 6])) == [7, 8]
    assert ask(copier, "d", request([1, 7, 8])) == [9]
    assert copier.copied("d")
    alone = DraftCopier(2)
    ask(alone, "a", answered)
    alone.forget(["a"])
    assert ask(alone, "c", request([1, 5, 6])) == [0, 0]


@pytest.mark.parametrize("kept_out", [{"aurora_learn": False}, {"aurora_learn": "false"}, {"salt": "tenant"}])
def test_who_wants_no_part_in_it_leaves_nothing(kept_out: dict[str, Any]) -> None:
    copier = DraftCopier(2, answers=100)
    ask(copier, "a", request([5, 6, 7, 8], **kept_out))
    copier.forget(["a"])
    assert ask(copier, "b", request([1, 5, 6])) == [0, 0]


def test_a_request_with_a_salt_takes_nothing() -> None:
    copier = DraftCopier(2, answers=100)
    ask(copier, "a", request([5, 6, 7, 8]))
    copier.forget(["a"])
    assert ask(copier, "b", request([1, 5, 6], salt="tenant")) == [0, 0]
    assert ask(copier, "c", request([1, 5, 6], aurora_learn=False)) == [7, 8]


def test_of_two_copies_the_one_that_has_been_right_is_taken() -> None:
    copier = DraftCopier(2, answers=100)
    ask(copier, "a", request([5, 6, 7, 8]))
    copier.forget(["a"])
    for _ in range(40):
        copier.copies.simulate(own(2), 2, 0)
        copier.copies.simulate(others(2), 2, 2)
    assert ask(copier, "b", request([5, 6, 3, 4, 5, 6])) == [7, 8]
    for _ in range(400):
        copier.copies.simulate(own(2), 2, 2)
        copier.copies.simulate(others(2), 2, 0)
    assert ask(copier, "c", request([5, 6, 3, 4, 5, 6])) == [3, 4]


def test_copied_verdicts_count_for_the_draft_length_and_for_no_version(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        assert advisor.draft_length(2) == 2  # as the settings of this session say
        requests = {"a": request([5, 6, 7, 5, 6]), "b": request([1, 2, 3])}
        advisor.drafts_arrived(proposals(a=[0, 0], b=[0, 0]), requests)
        advisor.verified(2, 2, "a")
        advisor.verified(2, 0, "b")
        scheduler = advisor._control.scheduler
        assert (scheduler.copied_drafts, scheduler.copied_tokens, scheduler.copied_accepted) == (1, 2, 2)
        assert [(row.num_drafts, row.num_accepted) for row in scheduler.acceptance()] == [(1, 0)]
        assert advisor._controller.acceptance._live.trials[0] == 1.0
        assert scheduler.copying == "on"


def test_a_fault_in_copying_leaves_the_drafts_as_they_are(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        broken = request([])
        del broken.all_token_ids
        arrived = proposals(a=[3, 4])
        advisor.drafts_arrived(arrived, {"a": broken})
        assert arrived.draft_token_ids == [[3, 4]]
        advisor.verified(2, 1, "a")
        assert "failed" in advisor._control.scheduler.copying
        assert advisor._control.scheduler.copied_drafts == 0


def test_where_copying_is_off_it_says_why(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2, no_copies="off by the settings")
        arrived = proposals(a=[0, 0])
        advisor.drafts_arrived(arrived, {"a": request([5, 6, 7, 5, 6])})
        assert arrived.draft_token_ids == [[0, 0]]
        assert advisor._control.scheduler.copying == "off by the settings"
