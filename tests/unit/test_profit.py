"""The draft-length controller against simulated machines whose best K is known."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.acceptance import AcceptanceEstimate
from aurora_vllm.control.copying import Copies
from aurora_vllm.control.probing import PATIENCE, PROBE_EVERY, PROBE_STEPS
from aurora_vllm.control.profit import PLAN_EVERY, DraftLengthController
from aurora_vllm.control.rating import Plan, Rating
from aurora_vllm.control.second_chance import FIRST
from aurora_vllm.control.step_costs import STEPS_TO_KNOW


def simulate(
    controller: DraftLengthController, chance: float, cost: float, steps: int, batch: int = 1, seed: int = 0
) -> tuple[list[int], float]:
    """A machine where a draft is accepted with ``chance`` and costs ``cost`` of a plain step, half of it to propose it
    and half to verify it for the whole batch. Returns the K chosen in each step and tokens per second over plain
    decoding's."""
    rng = random.Random(seed)
    chosen, seconds, tokens = [], 0.0, 0
    previous = 0
    for _ in range(steps):
        k = controller.decide(batch).draft_length
        chosen.append(k)
        spent = 1.0 + cost * (k + previous) / 2
        seconds += spent
        for _ in range(batch):
            accepted = 0
            while accepted < previous and rng.random() < chance:
                accepted += 1
            tokens += 1 + accepted
            if previous:
                controller.acceptance.take({(previous, accepted): 1})
        controller.costs.observe(batch, k, previous * batch, spent * rng.uniform(0.95, 1.05))
        previous = k
    return chosen, tokens / seconds / batch


def gain(controller: DraftLengthController, bucket: int, draft_length: int) -> float:
    """Tokens per second with K drafts (0: copies alone, at their best length) over those of plain decoding."""
    return max((plan.gain for plan in controller._plans(bucket) if plan.drafted == draft_length), default=0.0)


def shadow(chance: float) -> list[float]:
    return [chance ** (i + 1) for i in range(3)]


def test_an_untried_draft_is_not_served_blindly() -> None:
    chosen, rate = simulate(DraftLengthController(3), chance=0.02, cost=0.15, steps=600)
    assert set(chosen) == {0}
    assert rate == pytest.approx(1.0)


def test_a_draft_that_became_good_is_found_through_the_shadow() -> None:
    controller = DraftLengthController(3)
    simulate(controller, 0.05, 0.12, 100)
    controller.acceptance.shadow(shadow(0.6))
    chosen, rate = simulate(controller, 0.6, 0.12, 600)
    assert chosen[-1] > 0
    assert rate > 1.3


def test_a_shadow_that_promised_too_much_is_found_out() -> None:
    controller = DraftLengthController(3)
    controller.acceptance.shadow(shadow(0.7))
    chosen, rate = simulate(controller, chance=0.02, cost=0.2, steps=1500)
    assert chosen[-1] == 0
    assert rate > 0.93


def test_plain_decoding_is_looked_at_again_while_drafting() -> None:
    controller = DraftLengthController(3, prior=0.7)
    chosen, _ = simulate(controller, 0.7, 0.1, 3 * PROBE_EVERY)
    assert 0 in chosen[PROBE_EVERY // 2 :]
    assert chosen[PROBE_EVERY // 2 :].count(0) < 0.05 * len(chosen)


@pytest.mark.parametrize("steps_disturbed", [5, 300])
def test_a_probe_that_was_disturbed_is_not_the_last_word(steps_disturbed: int) -> None:
    """Another process makes drafting look twice as expensive, in one burst or for a while; then it is gone."""
    controller = DraftLengthController(3)
    simulate(controller, 0.6, 0.1, 40)  # plain decoding is known
    controller.acceptance.shadow(shadow(0.6))
    disturbed, _ = simulate(controller, 0.6, 1.2, steps_disturbed)
    assert 0 in disturbed or steps_disturbed == 5
    chosen, rate = simulate(controller, 0.6, 0.1, 3 * PATIENCE * PROBE_EVERY)
    assert max(chosen[-2 * PROBE_STEPS :]) > 0 and rate > 1.1


def serve_copies(
    controller: DraftLengthController, steps: int, price: float, slow: int = 0, kinds: int = 2
) -> list[tuple[bool, float]]:
    """A machine of four requests, half of whose proposals are copies with tokens accepted at 0.75 (``kinds`` 1: none
    is). The first ``slow`` steps that verify take three times as long. For each step: whether it verified, and tokens
    over seconds."""
    assert controller.copies is not None
    rng, found = random.Random(0), []
    for _ in range(steps):
        decision, verified, tokens = controller.decide(4), 0, 0
        for _ in range(4):
            kind = rng.randrange(kinds)
            controller.copies.seen(kind)
            worth = controller.worth(kind, copied=True) if kind and decision.proposals != "none" else 0
            right = next((i for i in range(8) if rng.random() >= 0.75), 8) if kind else 0
            if kind:
                controller.copies.simulate(kind, worth or 8, min(right, worth or 8))
            verified, tokens = verified + worth, tokens + 1 + min(right, worth)
        seconds = 1.0 + price * verified
        if verified and slow:
            slow, seconds = slow - 1, 3 * seconds
        controller.costs.observe(4, 0, verified, seconds * rng.uniform(0.95, 1.05))
        found.append((verified > 0, tokens / 4 / seconds))
    return found


def test_copies_whose_first_steps_were_disturbed_are_soon_tried_again() -> None:
    """Without a second chance it takes 500 steps."""
    steps = serve_copies(DraftLengthController(3, copies=Copies(8, [0.0, 0.5])), 400, price=0.01, slow=16)
    verified = [step[0] for step in steps]
    assert sum(verified[200:]) > 150
    assert max(len(list(group)) for value, group in itertools.groupby(verified) if not value) < 3 * FIRST * PLAN_EVERY


def test_time_without_copies_does_not_delay_the_second_chance() -> None:
    controller = DraftLengthController(3, copies=Copies(8, [0.0, 0.5]))
    serve_copies(controller, 3000, price=0.01, kinds=1)
    verified = [step[0] for step in serve_copies(controller, 800, price=0.01, slow=16)]
    begun = verified[verified.index(True) :]
    assert False in begun
    assert max(len(list(group)) for value, group in itertools.groupby(begun) if not value) < 3 * FIRST * PLAN_EVERY


def test_copies_that_never_pay_are_tried_seldom() -> None:
    """A token costs as much to verify as to decode, which is the most it can."""
    steps = serve_copies(DraftLengthController(3, copies=Copies(8, [0.0, 0.5])), 6000, price=0.25)
    assert 0 < sum(step[0] for step in steps[1000:]) < 0.02 * 5000
    assert sum(step[1] for step in steps) / len(steps) > 0.99


@pytest.mark.parametrize(("mode", "expected"), [("never", {0}), ("always", {3})])
def test_fixed_modes(mode: str, expected: set[int]) -> None:
    chosen, _ = simulate(DraftLengthController(3, mode=mode), 0.5, 0.1, 50)
    assert set(chosen) == expected


@settings(max_examples=40)
@given(st.floats(0.0, 0.95), st.floats(0.03, 0.6), st.sampled_from([1, 4]), st.integers(0, 1000))
def test_never_much_slower_than_plain_and_near_the_best_k(chance: float, cost: float, batch: int, seed: int) -> None:
    controller = DraftLengthController(3)
    controller.acceptance.shadow(shadow(chance))
    _, rate = simulate(controller, chance, cost, 2500, batch, seed)
    best = max(sum(chance**i for i in range(k + 1)) / (1 + cost * k) for k in range(4))
    assert rate > 0.95
    assert rate > 0.88 * best


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=200))
def test_expected_length_grows_with_k_and_stays_within_bounds(verdicts: list[tuple[int, int]]) -> None:
    estimate = AcceptanceEstimate(3)
    for drafts, accepted in verdicts:
        estimate.take({(drafts, min(drafts, accepted)): 1})
    lengths = [estimate.expected_length(k) for k in range(4)]
    assert lengths[0] == 1.0
    assert all(a <= b <= a + 1 for a, b in itertools.pairwise(lengths))


def test_new_version_lets_the_shadow_speak_again() -> None:
    estimate = AcceptanceEstimate(3)
    for _ in range(500):
        estimate.take({(3, 0): 1})
    estimate.shadow(shadow(0.8))
    before = estimate.expected_length(3)
    for _ in range(4):
        estimate.new_version()
    assert estimate.expected_length(3) > before + 0.5


@pytest.mark.parametrize("wanted", [False, True])
def test_a_hopeless_draft_is_probed_only_for_its_verdict(wanted: bool) -> None:
    """A version that looks worse than the one before is tried on until that is decided."""
    controller = DraftLengthController(3)
    simulate(controller, 0.0, 0.15, 50)
    controller.wants_verdicts = wanted
    chosen, _ = simulate(controller, 0.0, 0.15, 4 * PROBE_EVERY)
    assert (max(chosen) > 0) == wanted
    assert sum(k > 0 for k in chosen) < 0.1 * len(chosen)


def test_the_draft_sits_prompts_out_while_drafting_is_far_off() -> None:
    controller = DraftLengthController(3)
    assert controller.decide(1).sits_out  # an untried draft, before anything was measured
    simulate(controller, 0.0, 0.15, 100)
    assert controller.decide(1).sits_out
    controller.wants_verdicts = True
    simulate(controller, 0.0, 0.15, 8)  # a decision stands for some steps
    assert not controller.decide(1).sits_out
    controller.wants_verdicts = False
    controller.acceptance.shadow(shadow(0.6))  # the learner has published
    simulate(controller, 0.6, 0.12, 100)
    assert not controller.decide(1).sits_out
    simulate(controller, 0.6, 2.0, 2000)  # the machine is another one: a good draft, but far too dear
    assert controller.decide(1).sits_out


@pytest.mark.parametrize(("mode", "sits_out"), [("never", True), ("always", False)])
def test_fixed_modes_decide_about_prompts_too(mode: str, sits_out: bool) -> None:
    assert DraftLengthController(3, mode=mode).decide(1).sits_out == sits_out


def test_a_draft_the_user_gave_sees_prompts_from_the_start() -> None:
    assert not DraftLengthController(3, prior=0.6).decide(1).sits_out


def copying(
    controller: DraftLengthController, share: float, chance: float, rows: int = 400, seed: int = 0, kind: int = 4
) -> None:
    """What is known of copies: there for ``share`` of the rows, right with ``chance``; drafts never are."""
    assert controller.copies is not None
    rng = random.Random(seed)
    for _ in range(rows):
        met = kind if rng.random() < share else 0
        controller.copies.seen(met)
        if met:
            accepted = next((i for i in range(3) if rng.random() >= chance), 3)
            controller.copies.simulate(met, 3, accepted)
            controller.copies.compare(met, accepted > 0, False)


def plain_steps(controller: DraftLengthController, batch: int = 4, token: float = 0.05, draft: float = 0.1) -> None:
    """A machine that is known: prices of a verified and of a drafted token, of a plain step."""
    rng = random.Random(1)
    for step in range(200):
        drafted, verified = (0, 0) if step % 4 == 0 else (rng.randint(0, 3), rng.randint(0, 3 * batch))
        controller.costs.observe(batch, drafted, verified, 1.0 + token * verified + draft * drafted)


def test_copies_pay_before_the_draft_has_learned_anything() -> None:
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
    plain_steps(controller)
    copying(controller, share=0.5, chance=0.8)
    decision = controller.decide(4)
    assert decision.draft_length == 0 and "copying alone pays at batch 4" in decision.reason
    assert gain(controller, 4, 0) > gain(controller, 4, 1) > gain(controller, 4, 3) > 1.0
    assert controller.worth(4, True) == 3  # 0.8, 0.64, 0.51, at 0.05 of a step each, for four requests
    assert controller.worth(0, False) == 0


def test_a_token_is_verified_where_it_is_likely_enough_for_its_price() -> None:
    lengths = []
    for token in (0.01, 0.1, 0.15, 0.4):
        controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
        plain_steps(controller, token=token)
        copying(controller, share=0.5, chance=0.7)
        controller.decide(4)
        lengths.append(controller.worth(4, True))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 3 and lengths[-1] == 0


@pytest.mark.parametrize(("token", "draft", "could_pay"), [(0.06, 0.06, False), (0.005, 0.06, True)])
def test_whether_a_draft_could_pay_beside_copies_is_known_before_it_has_learned(
    token: float, draft: float, could_pay: bool
) -> None:
    """A small model on two cores, and one whose step hardly gets longer: the same draft, the same copies."""
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
    assert controller.could_pay  # nothing speaks against it yet
    controller.acceptance.shadow([0.15, 0.02, 0.0])
    plain_steps(controller, token=token, draft=draft)
    copying(controller, share=0.6, chance=0.7)
    decision = controller.decide(4)
    assert controller.could_pay == could_pay
    assert decision.draft_length == 0 and decision.sits_out != could_pay


def test_copies_that_are_never_right_cost_nothing() -> None:
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
    plain_steps(controller)
    copying(controller, share=0.9, chance=0.02)
    decision = controller.decide(4)
    assert decision.proposals == "none" and controller.worth(4, True) == 0
    assert gain(controller, 4, 0) == 1.0


@pytest.mark.parametrize("draft_is_better", [False, True])
def test_copies_pay_without_a_draft_however_good_the_draft_is(draft_is_better: bool) -> None:
    """A draft that is right more often than copies, and too dear to be asked, takes nothing from them."""
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
    plain_steps(controller, draft=2.0)
    copying(controller, share=0.5, chance=0.8)
    for _ in range(300 if draft_is_better else 0):
        controller.copies.compare(4, False, True)
        controller.acceptance.take({(3, 3): 1})
    decision = controller.decide(4)
    assert controller.copies.preferred(4) != draft_is_better
    assert decision.draft_length == 0 and gain(controller, 4, 0) > 1.1
    assert controller.worth(4, True) == 3


def test_a_good_draft_is_used_beside_copies_and_cut_to_what_pays() -> None:
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]))
    plain_steps(controller, token=0.03, draft=0.03)
    copying(controller, share=0.4, chance=0.8)
    for _ in range(300):
        controller.acceptance.take({(3, random.Random(_).choice([0, 1, 1, 1, 3])): 1})
    decision = controller.decide(4)
    assert decision.draft_length > 0 and "drafting pays" in decision.reason
    assert gain(controller, 4, decision.draft_length) > gain(controller, 4, 0) > 1.1
    assert 1 <= controller.worth(0, False) <= decision.draft_length
    assert controller.worth(4, True) == 3  # a copy may be longer than K: nobody had to draft it


@pytest.mark.parametrize(("mode", "length"), [("always", 3), ("never", 0)])
def test_fixed_modes_leave_proposals_whole_or_make_none(mode: str, length: int) -> None:
    controller = DraftLengthController(3, mode=mode, copies=Copies(3, [0.0, *[0.5] * 9]))
    controller.decide(2)
    assert controller.worth(0, False) == controller.worth(5, True) == length


def test_what_a_step_saved_is_what_was_accepted_less_what_it_cost() -> None:
    controller = DraftLengthController(max_draft_length=3)
    assert controller.settle(4, 0, 8, 8) == 0.0  # nobody knows yet
    for i in range(400):
        verified = 0 if i % 2 else 6
        controller.costs.observe(4, 0, verified, 0.08 + (0.02 if verified else 0.0))
    assert controller.settle(4, 0, 6, 2) == pytest.approx(0.08 * 2 / 4 - 0.02, abs=2e-3)
    assert controller.settle(4, 0, 6, 0) == pytest.approx(-0.02, abs=2e-3)
    assert controller.settle(4, 0, 0, 0) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("better_by", "changes"), [(0.01, False), (0.05, True)])
def test_a_length_that_promises_hardly_more_is_no_reason_to_change(
    monkeypatch: pytest.MonkeyPatch, better_by: float, changes: bool
) -> None:
    controller = DraftLengthController(2, prior=0.9)
    for _ in range(STEPS_TO_KNOW):
        controller.decide(1)
        controller.costs.observe(1, 0, 0, 1.0)
    gains = {0: 1.0, 1: 1.5, 2: 1.4}
    monkeypatch.setattr(Rating, "plan", lambda self, k, *_: Plan(k, k, gains[k], gains[k], float(k)))
    assert controller.decide(1).draft_length == 1
    gains[2] = 1.5 * (1 + better_by)
    assert {controller.decide(1).draft_length for _ in range(PLAN_EVERY)} == ({1, 2} if changes else {1})


@pytest.mark.parametrize("prior", [0.0, 0.6])
def test_verdicts_of_long_ago_do_not_keep_a_draft_out(prior: float) -> None:
    """Traffic it accepted nothing of is gone; the learner says so, or the draft was given and nobody does."""
    controller = DraftLengthController(3, prior=prior)
    controller.acceptance.shadow(shadow(0.6))
    simulate(controller, 0.0, 0.12, 3000)
    controller.acceptance.shadow(shadow(prior or 0.7))
    for _ in range(20):
        chosen, _ = simulate(controller, 0.7, 0.12, 500)
        if chosen[-1]:
            return
    pytest.fail("it never drafted again")
