"""Rates a choice of how many tokens to draft and how many to verify. Numbers in, numbers out::

    gain   = tokens a request is expected to gain * t(plain) / t(choice)     t: predicted seconds of a step

Where proposals can be cut one by one, only tokens count that are likely enough to be worth verifying. Where all
proposals of a batch have one length, all of it is verified, right or wrong, even for a request without a copy.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aurora_vllm.control.step_costs import StepCosts

WORTHWHILE = 1.03  # rate over plain decoding's that copying alone must promise; less is not worth the risk


class Offer(NamedTuple):
    """A proposal: how often it occurs, whether it is a copy, and the chance that its tokens 0..i are all right."""

    share: float
    copied: bool
    chain: list[float]


@dataclass(frozen=True)
class Plan:
    """A choice and its rating: its rate over plain decoding's; tokens a request gains and verifies per step."""

    drafted: int
    proposed: int
    gain: float
    tokens: float
    verified: float


PLAIN = Plan(0, 0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Rating:
    """Rates choices at one batch size.

    Args:
        costs: of steps; those of plain decoding must be known.
        bucket: of the batch size.
        price: chance of acceptance below which one more token is not worth the time to verify it.
        cut: proposals are cut to what is worth verifying.
        uniform: the same number of tokens is verified for every request.
    """

    costs: StepCosts
    bucket: int
    price: float
    cut: bool
    uniform: bool

    def plan(self, drafted: int, proposed: int, offers: Sequence[Offer]) -> Plan:
        """Rate drafting ``drafted`` tokens for each request; ``proposed`` is the length of uniform proposals."""
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

    def worthwhile(self, copied: bool, chain: list[float], draft_length: int) -> list[float]:
        """The chances of those tokens of a proposal that are worth verifying; all of them if it is not cut."""
        there = chain if copied else chain[:draft_length]
        return there[: bisect_left(there, -self.price, key=operator.neg)] if self.cut else there  # they only fall
