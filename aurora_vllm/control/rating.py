"""What a choice of how much to draft, and how much to verify, would give. Numbers in, numbers out::

    gain   = tokens a request is expected to gain * t(plain) / t(choice)     t: predicted seconds of a step

Where proposals can be cut, request by request, only tokens that are likely enough to pay for being verified count.
Where all of a batch have one length all of it is verified, right or wrong: a request without a copy verifies anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_vllm.control.step_costs import StepCosts

WORTHWHILE = 1.03  # of plain decoding's rate, that copying alone must promise: below it is a gamble for nothing


class Offer(NamedTuple):
    """Something to propose: how often there is, whether it is a copy, the chance that its tokens 0..i are all right."""

    share: float
    copied: bool
    chain: list[float]


@dataclass(frozen=True)
class Plan:
    """A choice and what it would give: its rate over plain decoding's, and what a request gains and verifies a step."""

    drafted: int
    proposed: int
    gain: float
    tokens: float
    verified: float


PLAIN = Plan(0, 0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Rating:
    """At one batch size.

    Args:
        costs: of steps; plain decoding has to be known.
        bucket: the batch size's.
        price: chance of acceptance below which the time to verify one more token gains more elsewhere.
        cut: proposals are cut to what is worth being verified.
        uniform: as many tokens are verified of every request.
    """

    costs: StepCosts
    bucket: int
    price: float
    cut: bool
    uniform: bool

    def plan(self, drafted: int, proposed: int, offers: Sequence[Offer]) -> Plan:
        """The draft runs for so many tokens of each request, and proposals have so many where all have as many."""
        tokens, verified = 1.0, 0.0
        for share, copied, chain in offers:
            likely = self.worthwhile(copied, chain, drafted)[: proposed if self.uniform else None]
            tokens += share * sum(likely)
            verified += share * len(likely)
        if self.uniform:
            verified = float(proposed)
        seconds = self.costs.predict(self.bucket, drafted, verified * self.bucket)
        gain = tokens * self.costs.predict(self.bucket) / seconds
        return PLAIN if drafted == 0 and gain < WORTHWHILE else Plan(drafted, proposed, gain, tokens, verified)

    def worthwhile(self, copied: bool, chain: Sequence[float], draft_length: int) -> list[float]:
        """Chances of those tokens of a proposal that are worth being verified: all that are there, if it is not cut."""
        there = chain if copied else chain[:draft_length]
        return list(itertools.takewhile(lambda chance: chance > self.price, there) if self.cut else there)
