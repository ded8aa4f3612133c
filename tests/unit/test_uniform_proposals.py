"""Proposals that have one length for the whole batch, as where the worker replaces them, on machines of known costs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.copying import Copies
from aurora_vllm.control.decision import Decision
from aurora_vllm.control.probing import PATIENCE, PROBE_EVERY
from aurora_vllm.control.profit import KEEP_MARGIN, PLAN_EVERY, DraftLengthController
from aurora_vllm.control.rating import WORTHWHILE
from tests.unit.test_profit import copying, gain, plain_steps


def uniform(
    share: float,
    chance: float,
    token: float = 0.02,
    draft: float = 0.1,
    drafts: float = 0.0,
    lengths: tuple[int, ...] = (1, 2, 3),
) -> DraftLengthController:
    """Proposals all have one length; copies are there for ``share`` of the requests, drafts are right with
    ``drafts``."""
    controller = DraftLengthController(3, copies=Copies(3, [0.0, *[0.5] * 9]), lengths=lengths)
    plain_steps(controller, token=token, draft=draft)
    if share:
        copying(controller, share, chance)
    rng = random.Random(2)
    for _ in range(300 if drafts else 0):
        controller.acceptance.take({(3, next((i for i in range(3) if rng.random() >= drafts), 3)): 1})
    return controller


def settled(controller: DraftLengthController) -> Decision:
    """Longer proposals are tried one after the other."""
    return [controller.decide(4) for _ in range(4 * PLAN_EVERY)][-1]


def uniform_gain(controller: DraftLengthController, drafted: int, proposed: int) -> float:
    """By the book: every request verifies ``proposed`` tokens, whatever they are."""
    assert controller.copies is not None
    tokens = 1.0
    for kind, share in controller.copies.shares():
        copied = controller.copies.preferred(kind) if drafted else kind > 0
        if copied or drafted:
            chain = controller.copies.chain(kind) if copied else controller.acceptance.chain()
            tokens += share * sum(chain[:proposed])
    return tokens * controller.costs.predict(4) / controller.costs.predict(4, drafted, proposed * 4)


@settings(max_examples=60)
@given(
    st.floats(0, 1),
    st.floats(0, 0.95),
    st.floats(0.002, 0.3),
    st.floats(0, 0.5),
    st.floats(0, 0.9),
    st.sampled_from([(1, 2, 3), (1, 3), (2,)]),
)
def test_of_uniform_proposals_the_best_length_and_maker_wins(
    share: float, chance: float, token: float, draft: float, drafts: float, lengths: tuple[int, ...]
) -> None:
    controller = uniform(share, chance, token, draft, drafts, lengths)
    copying(controller, share, chance / 4, kind=7)  # what is seldom right is verified with the rest, and counts
    decision = settled(controller)
    chosen = uniform_gain(controller, decision.draft_length, decision.proposed)
    alone = max(uniform_gain(controller, 0, k) for k in (0, *lengths))
    beside = max(uniform_gain(controller, k, k) for k in range(1, 4))
    assert decision.draft_length == decision.proposed or (not decision.draft_length and decision.proposed in lengths)
    assert chosen >= 1.0 and (decision.proposed == 0 or chosen > 1.0 + KEEP_MARGIN)
    assert chosen * (1.0 + KEEP_MARGIN) ** 2 >= max(alone if alone >= WORTHWHILE else 1.0, beside) * (1.0 - 1e-9)
    assert decision.draft_length or not decision.proposed or chosen >= WORTHWHILE
    assert gain(controller, 4, 0) == pytest.approx(alone if alone >= WORTHWHILE else 1.0)
    assert decision.proposals == ("whole" if decision.proposed else "none")


@pytest.mark.parametrize(
    ("machine", "drafted", "proposed", "reason"),
    [
        ({"share": 0.0, "chance": 0.0}, 0, 0, "drafting does not pay at batch 4"),
        ({"share": 0.9, "chance": 0.97}, 0, 3, "copying alone pays at batch 4: it gives"),
        ({"share": 0.9, "chance": 0.97, "draft": 0.5, "drafts": 0.8}, 0, 3, "copying alone pays at batch 4: it gives"),
        ({"share": 0.1, "chance": 0.9, "draft": 0.03, "drafts": 0.8}, 3, 3, "drafting pays at batch 4: K=3 gives"),
        ({"share": 0.9, "chance": 0.97, "token": 1.0}, 0, 0, "drafting does not pay at batch 4"),  # compute-bound
        ({"share": 0.9, "chance": 0.02}, 0, 0, "drafting does not pay at batch 4"),
    ],
)
def test_uniform_proposals_on_machines_whose_answer_is_plain(
    machine: dict[str, float], drafted: int, proposed: int, reason: str
) -> None:
    decision = settled(uniform(**machine))
    assert (decision.draft_length, decision.proposed) == (drafted, proposed)
    assert reason in decision.reason
    assert decision.sits_out == (not drafted)


def test_fillers_are_paid_for() -> None:
    """Where copies are rare all other requests verify tokens that are wrong; cut by themselves, they would not."""
    rare, usual = uniform(0.1, 0.9, token=0.03), uniform(0.8, 0.9, token=0.03)
    assert settled(rare).proposed == 0 and settled(usual).proposed == 3
    rare.lengths = ()
    assert gain(rare, 4, 0) > WORTHWHILE


def test_uniform_proposals_are_given_up_when_tokens_become_dear_and_come_back() -> None:
    controller = uniform(0.9, 0.9)
    assert settled(controller).proposed == 3
    plain_steps(controller, token=1.0)
    plain_steps(controller, token=1.0)
    assert settled(controller).proposed == 0
    assert controller.decide(4).reason.startswith("drafting does not pay")
    for _ in range(5):
        plain_steps(controller)
    assert settled(controller).proposed == 3


def test_beside_copies_alone_plain_decoding_and_a_hopeful_draft_are_probed() -> None:
    controller = uniform(0.5, 0.9, draft=0.2, drafts=0.9)
    decisions = [controller.decide(4) for _ in range(3 * PATIENCE * PROBE_EVERY)]
    probes = [decision for decision in decisions if decision.reason.startswith("probing")]
    alone = [decision for decision in decisions if decision not in probes]
    later = {(decision.draft_length, decision.proposed) for decision in alone[3 * PLAN_EVERY :]}
    assert later == {(0, 3)}
    drafting = {decision.draft_length for decision in probes} - {0}
    assert drafting and len(drafting) == 1 and len(probes) < 0.1 * len(decisions)
    assert all(decision.proposed == decision.draft_length for decision in probes)
    assert any(decision.proposed == 0 for decision in probes)


@pytest.mark.parametrize(("mode", "length"), [("always", 3), ("never", 0)])
def test_fixed_modes_fix_uniform_proposals_too(mode: str, length: int) -> None:
    decision = DraftLengthController(3, mode=mode, copies=Copies(5, [0.0, *[0.5] * 9]), lengths=(1, 5)).decide(2)
    assert decision.draft_length == decision.proposed == length


def test_without_copies_proposals_are_the_drafts_and_as_long() -> None:
    one, other = DraftLengthController(3, prior=0.8, lengths=(1, 5)), DraftLengthController(3, prior=0.8)
    for controller in (one, other):
        plain_steps(controller, draft=0.02, token=0.01)
    for _ in range(2 * PROBE_EVERY):
        decision, theirs = one.decide(4), other.decide(4)
        assert decision.draft_length == decision.proposed == theirs.draft_length
        assert decision.proposals == theirs.proposals
    assert Decision(2, "").proposed == 2


def test_copies_that_are_made_elsewhere_may_come_and_go() -> None:
    """It is the worker who makes them: some time after the controller was there, and no more if it fails."""
    controller = uniform(0.9, 0.97)
    copies, controller.copies = controller.copies, None
    for there, proposed in ((None, 0), (copies, 3), (None, 0), (copies, 3)):
        controller.copies = there
        decision = settled(controller)
        assert decision.proposed == proposed and decision.draft_length == 0


@dataclass
class Traffic:
    """Requests of a batch have a copy with a chance of ``share``; each of its tokens is right with ``right``."""

    batch: int
    token: float  # what a verified token costs, of a plain step
    share: float = 0.5
    right: float = 0.9

    def serve(self, controller: DraftLengthController, steps: int, seed: int = 0) -> list[float]:
        """Tokens a second of each step over plain decoding's. Counts come every 16 steps, as from a device."""
        assert controller.copies is not None
        rng, rates, verified = random.Random(seed), [], 0
        seen, simulated = Counter[int](), Counter[tuple[int, int]]()
        for step in range(steps):
            decision, accepted = controller.decide(self.batch), 0
            for _ in range(self.batch):
                kind = int(rng.random() < self.share)
                right = next((i for i in range(8) if rng.random() >= self.right), 8) * kind
                seen[kind] += 1
                simulated[8, right] += kind
                accepted += min(right, verified)
            tokens = verified * self.batch
            seconds = 1.0 + self.token * tokens + 0.02 * (tokens > 0)
            controller.costs.observe(self.batch, 0, tokens, seconds)
            controller.settle(self.batch, 0, tokens, accepted)
            rates.append((1.0 + accepted / self.batch) / seconds)
            if step % 16 == 15:
                controller.copies.take([seen[0], seen[1], *[0] * 8], {}, {1: simulated} if simulated.total() else {})
                seen.clear()
                simulated = Counter()
            verified = decision.proposed
        return rates


@pytest.mark.parametrize(("batch", "token"), [(1, 0.1), (2, 0.1), (4, 0.04), (16, 0.004), (64, 0.002)])
def test_text_that_stops_repeating_itself_costs_little(batch: int, token: float) -> None:
    """Each request's proposal goes on being verified, and what decides remembers when it was worth it."""
    controller = DraftLengthController(3, copies=Copies(8, [0.0, *[0.5] * 9], 250.0), lengths=(1, 2, 3, 8))
    before = Traffic(batch, token).serve(controller, 600)
    assert mean(before[300:]) > 1.1
    after = Traffic(batch, token, share=0.0).serve(controller, 600)
    assert sum(1.0 - rate for rate in after) < 60.0  # plain steps lost
    assert mean(after[200:]) > 0.98
    again = Traffic(batch, token).serve(controller, 600)
    assert mean(again[300:]) > 1.1


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_what_longer_proposals_cost_is_found_out_step_by_step(batch: int) -> None:
    """On a machine that is bound by its arithmetic, so that each verified token costs as much as a plain one."""
    controller = DraftLengthController(3, copies=Copies(8, [0.0, *[0.5] * 9], 250.0), lengths=(1, 2, 3, 8))
    rates = Traffic(batch, 1.0 / batch, share=0.9).serve(controller, 600)
    assert sum(1.0 - rate for rate in rates) < 20.0 and mean(rates[100:]) > 0.98
    cheap = DraftLengthController(3, copies=Copies(8, [0.0, *[0.5] * 9], 250.0), lengths=(1, 2, 3, 8))
    rates = Traffic(batch, 0.001 / batch, share=0.1).serve(cheap, 600)
    assert mean(rates[300:]) > 1.2  # whatever one token gains, eight are tried


@pytest.mark.parametrize("batch", [1, 8])
def test_a_draft_that_promises_too_much_is_found_out_beside_copies_too(batch: int) -> None:
    """What says that it does not pay are the verdicts on it; none of them may be forgotten because of that."""
    rng, rates, verified = random.Random(0), list[float](), 0
    controller = DraftLengthController(3, prior=0.6, copies=Copies(8, [0.0, *[0.5] * 9], 250.0), lengths=(1, 2, 3, 8))
    verdicts = Counter[tuple[int, int]]()
    for step in range(2000):
        decision = controller.decide(batch)
        accepted = [next((i for i in range(verified) if rng.random() >= 0.02), verified) for _ in range(batch)]
        seconds = 1.0 + 0.04 * decision.draft_length + 0.002 * verified * batch
        controller.costs.observe(batch, decision.draft_length, verified * batch, seconds)
        controller.settle(batch, decision.draft_length, verified * batch, sum(accepted))
        rates.append((1.0 + mean(accepted)) / seconds)
        verdicts.update((verified, count) for count in accepted if verified)
        if step % 16 == 15:
            controller.copies.take([16 * batch, *[0] * 9], {}, {})
            controller.acceptance.take(verdicts)
            verdicts.clear()
        verified = decision.proposed
    assert mean(rates[1000:]) > 0.95
