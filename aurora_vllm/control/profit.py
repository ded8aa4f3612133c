"""How many tokens to draft, decided by measured tokens per second.

Acceptance alone is the wrong signal: a draft that is often right can still cost more than it saves once the batch is
compute-bound. So every draft length K, 0 included, is rated by the tokens a step is expected to gain over the seconds
it is expected to take at the present batch size (:mod:`.rating`), and the best rate wins. Copies cost nothing to
propose, so they count at each K. Where all proposals of a batch have one length, copies alone are rated, too, at each
length they may have. Numbers in, decisions out: no vLLM, no torch.

The price of verifying one more token, expressed as a chance of acceptance::

    price = seconds to verify one more token * batch * gain of what is chosen / t(plain)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from aurora_vllm.control.acceptance import AcceptanceEstimate
from aurora_vllm.control.balance import Balance
from aurora_vllm.control.copying import Copies
from aurora_vllm.control.decision import Decision, reason_for
from aurora_vllm.control.probing import Probing
from aurora_vllm.control.prospect import prospect
from aurora_vllm.control.rating import Offer, Plan, Rating
from aurora_vllm.control.second_chance import SecondChance
from aurora_vllm.control.step_costs import StepCosts, batch_bucket

HOPEFUL = 0.95  # of the rate without drafting: a K with less looks bad
WORTH_A_PROBE = 1.1  # expected acceptance length below which drafting is not even tried
WORTH_LEARNING = 1.05  # rate, over that without drafting, that a good draft would have to have
KEEP_MARGIN = 0.02  # relative gain that a change must promise
STRIDE = 3  # the next proposal may be this many times as long as the longest so far
PLAN_EVERY = 8  # steps a decision stands: its inputs change slowly, and deciding takes about 1 ms


@dataclass
class _BucketState:
    choice: tuple[int, int] = (0, 0)  # tokens drafted, tokens proposed
    longest: int = 0  # proposal so far
    gain: float = 1.0
    could_pay: bool = True  # drafting, if the draft were good
    probing: Probing = field(default_factory=Probing)
    second_chance: SecondChance = field(default_factory=SecondChance)
    stands: Decision | None = None
    stands_for: int = 0  # more steps


@dataclass
class DraftLengthController:
    """Chooses K for the next step, and how much of each proposal is verified.

    Args:
        max_draft_length: K is in 0..max_draft_length.
        mode: "auto" decides; "always" and "never" fix K.
        prior: conditional acceptance to assume before evidence (0: wait for the learner's shadow).
        copies: statistics of copied proposals; None where proposals cannot be replaced or cut.
        lengths: allowed lengths of copy-only proposals, ascending, where all requests of a step verify the same number
            of tokens; empty where each proposal is cut by itself.
    """

    max_draft_length: int
    mode: str = "auto"
    prior: float = 0.0
    copies: Copies | None = None
    lengths: tuple[int, ...] = ()
    wants_verdicts: bool = False  # probe even a draft that seems hopeless: a version on probation needs verdicts
    costs: StepCosts = field(init=False)
    _balance: Balance = field(default_factory=Balance)
    acceptance: AcceptanceEstimate = field(init=False)
    _buckets: dict[int, _BucketState] = field(default_factory=dict)
    _last: tuple[int, Decision] = field(init=False)

    def __post_init__(self) -> None:
        self.costs = StepCosts(uniform=bool(self.lengths))
        self.acceptance = AcceptanceEstimate(self.max_draft_length, self.prior)
        self._last = 1, Decision(0, "nothing was decided yet", "none")

    def decide(self, batch_size: int) -> Decision:
        """The decision for a step of this many requests. Call once for each step."""
        bucket = batch_bucket(batch_size)
        decision = self._decide(bucket)
        self._last = bucket, decision
        return decision

    @property
    def could_pay(self) -> bool:
        """Whether drafting would pay at the last step's batch size, if the draft were a good one."""
        state = self._buckets.get(self._last[0])
        return state is None or state.could_pay

    def worth(self, kind: int, copied: bool) -> int:
        """Tokens to verify of a present proposal, where each is cut by itself.

        Args:
            kind: of the copy that could be proposed; 0 for none.
            copied: whether the copy is proposed, not the draft's tokens.
        """
        bucket, decision = self._last
        if decision.proposals != "worthwhile":
            return decision.proposed if decision.proposals == "whole" else 0
        chain = self._chain(kind, copied)
        return len(self._rating(bucket).worthwhile(copied, chain, decision.draft_length))

    def settle(self, batch_size: int, drafted: int, verified: int, accepted: int) -> float:
        """Account for a finished step; where steps keep losing, the statistics of copies are weighed less.

        An accepted token is worth one request's part of a plain step, which it saves later, whatever else was in this
        step. The cost of proposing and verifying is deducted.

        Args:
            batch_size: number of requests.
            drafted, verified: as for :meth:`StepCosts.observe`.
            accepted: of the verified tokens, over all requests.

        Returns:
            Seconds by which the step was better than plain decoding; negative where it was worse.
        """
        bucket = batch_bucket(batch_size)
        if not self.costs.known(bucket):
            return 0.0
        plain = self.costs.predict(bucket)
        saved = plain * accepted / batch_size - (self.costs.predict(bucket, drafted, verified) - plain)
        if self.copies is not None and self.lengths and verified and self._balance.observe(saved / plain):
            self.copies.doubt()
            for state in self._buckets.values():
                state.stands = None
        return saved

    def _decide(self, bucket: int) -> Decision:
        if self.mode == "never":
            return Decision(0, "speculation is switched off by the settings", "none", sits_out=True)
        if self.mode == "always":
            return Decision(self.max_draft_length, "draft length is fixed by the settings", "whole")
        state = self._buckets.setdefault(bucket, _BucketState())
        state.probing.count_step()
        if not self.costs.known(bucket):
            sits_out = not self._worth_a_probe(self.max_draft_length)
            return Decision(0, f"measuring plain decoding at batch {bucket}", "none", sits_out)
        if state.probing.takes_next_step():
            state.stands = None
            probed = state.probing.length
            return Decision(probed, f"probing K={probed} at batch {bucket}", "whole" if probed else "none")
        if state.stands is not None and state.stands_for > 0:
            state.stands_for -= 1
            if state.stands.draft_length:
                state.probing.drafted()
            return state.stands

        plans = self._plans(bucket)
        best = max(plans, key=lambda plan: plan.gain)
        now = next((plan for plan in plans if (plan.drafted, plan.proposed) == state.choice), plans[0])
        margin = 0.0 if now.drafted and not best.drafted else KEEP_MARGIN  # no risk in no longer drafting
        chosen = best if best.gain > now.gain * (1.0 + margin) else now
        state.choice = chosen.drafted, chosen.proposed
        state.longest = max(state.longest, chosen.proposed)
        state.gain = max(chosen.gain, 1.0)
        drafting = max((plan for plan in plans if plan.drafted), key=lambda plan: plan.gain)
        without = max(plan.gain for plan in plans if not plan.drafted)
        good = prospect(self._rating(bucket), self.copies, self.max_draft_length)
        state.could_pay = max(good, drafting.gain) >= WORTH_LEARNING * without
        hopeful = self.wants_verdicts or (state.could_pay and drafting.gain >= HOPEFUL * without)
        alternative = drafting.drafted if self._worth_a_probe(drafting.drafted) else 0
        state.probing.decided(chosen.verified > 0.0, chosen.drafted > 0, alternative, hopeful)
        if not (chosen.drafted or alternative) and state.probing.is_out_of_date():
            self.acceptance.forget()
        if (chosen.verified or self._copies_promise()) and state.second_chance.is_due(chosen.verified > 0.0):
            self.costs.doubt(bucket)
        sits_out = not chosen.drafted and not (alternative and hopeful)
        proposals = ("whole" if self._uniform else "worthwhile") if chosen.verified else "none"
        reason = reason_for(bucket, chosen, drafting, self._uniform)
        state.stands = Decision(chosen.drafted, reason, proposals, sits_out, chosen.proposed)
        state.stands_for = PLAN_EVERY - 1
        return state.stands

    @property
    def _uniform(self) -> bool:
        """Whether all proposals of a batch have one length. Only while there are copies, which may come and go."""
        return self.copies is not None and bool(self.lengths)

    def _plans(self, bucket: int) -> list[Plan]:
        """All choices. The first is K = 0: plain decoding or, where proposals are cut one by one, copies alone."""
        rating, (copies, drafts) = self._rating(bucket), self._offers()
        plans, most = [rating.plan(0, 0, copies)], self.max_draft_length
        longest = self._buckets[bucket].longest if bucket in self._buckets else 0
        for before, k in itertools.pairwise((0, *self.lengths) if self._uniform else ()):
            # The cost of longer proposals at this batch size is explored step by step, while shorter ones pay.
            if before and k > STRIDE * longest and max(plan.gain for plan in plans) > 1.0:
                most = min(most, before)
                break
            plans.append(rating.plan(0, k, copies))
        return plans + [rating.plan(k, k, drafts) for k in range(1, most + 1)]

    def _offers(self) -> tuple[list[Offer], list[Offer]]:
        """The proposals to expect, each with its share: where only copies are proposed, and where the draft runs."""
        drafted = self.acceptance.chain()
        if self.copies is None:
            return [Offer(1.0, False, drafted)], [Offer(1.0, False, drafted)]
        alone, beside = list[Offer](), list[Offer]()
        for kind, share in self.copies.shares():
            copied = self.copies.chain(kind) if kind else drafted
            alone.append(Offer(share, kind > 0, copied))  # without a draft a copy has no rival
            preferred = self.copies.preferred(kind)
            beside.append(Offer(share, preferred, copied if preferred else drafted))
        return alone, beside

    def _chain(self, kind: int, copied: bool) -> list[float]:
        """Chance that tokens 0..i of such a proposal are all accepted, for each i."""
        return self.copies.chain(kind) if copied and self.copies else self.acceptance.chain()

    def _rating(self, bucket: int) -> Rating:
        cut = self.copies is not None and not self._uniform
        return Rating(self.costs, bucket, self._price(bucket), cut, self._uniform)

    def _price(self, bucket: int) -> float:
        """Chance of acceptance below which one more token is not worth the time to verify it."""
        gain = self._buckets[bucket].gain if bucket in self._buckets else 1.0
        return self.costs.per_token(bucket) / self.costs.predict(bucket) * bucket * gain

    def _copies_promise(self) -> bool:
        """Whether copies would gain enough tokens to be tried, if verifying them were cheap. Not where all proposals of
        a batch have one length: there a trial costs much more."""
        return self.copies is not None and not self._uniform and 1 + self.copies.expected_tokens() >= WORTH_A_PROBE

    def _worth_a_probe(self, draft_length: int) -> bool:
        return self.wants_verdicts or self.acceptance.expected_length(draft_length) >= WORTH_A_PROBE
