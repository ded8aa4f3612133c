"""How often the target accepts a draft's tokens, by position. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 600.0  # verified drafts after which one has lost 1 - 1/e of its weight: the newest say most about the traffic
KEEP = 1.0 - 1.0 / WINDOW
SHADOW_WEIGHT = 40.0  # simulated verifications weigh as much as this many live ones
WEIGHT_OF_OLDER_VERSION = 0.25
WEIGHT_AFTER_A_REST = 0.5


Verdicts = Mapping[tuple[int, int], int]  # (tokens verified, tokens accepted) -> how often


def faded_sum(total: float, item: float, count: int, memory: float) -> float:
    """An exponentially fading sum after ``count`` more items, each (or on average) of the value ``item``.

    Args:
        memory: items after which one has lost 1 - 1/e of its weight.
    """
    keep = 1.0 - 1.0 / memory
    left = keep**count
    return total * left + item * (1.0 - left) / (1.0 - keep)


@dataclass
class Acceptance:
    """Live verdicts: how often token i was accepted where those before it were. Older ones count for less.

    ``trials`` and ``hits`` are weighted counts, one for each position.
    """

    positions: int
    trials: list[float] = field(init=False)
    hits: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.trials, self.hits = [0.0] * self.positions, [0.0] * self.positions

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """One request's verdict in one step."""
        for i in range(min(num_drafts, num_accepted + 1, self.positions)):
            self.trials[i] = self.trials[i] * KEEP + 1.0
            self.hits[i] = self.hits[i] * KEEP + (num_accepted > i)

    def take(self, verdicts: Verdicts) -> None:
        """Several verdicts of unknown order; they count as equally old."""
        for i in range(self.positions):
            trials = sum(count for (drafts, right), count in verdicts.items() if drafts > i and right >= i)
            if not trials:
                continue
            hits = sum(count for (drafts, right), count in verdicts.items() if drafts > i and right > i)
            self.trials[i] = faded_sum(self.trials[i], 1.0, trials, WINDOW)
            self.hits[i] = faded_sum(self.hits[i], hits / trials, trials, WINDOW)

    def fade(self, weight: float) -> None:
        """Multiply the weight of all that was counted so far."""
        self.trials, self.hits = ([count * weight for count in counts] for counts in (self.trials, self.hits))

    def accepted(self, deviations: float = 0.0) -> list[float]:
        """Mean accepted drafts of a verification with K drafts, for K = 0..positions.

        Args:
            deviations: standard deviations by which each chance is lowered (Wilson's score bound). A chance without
                verdicts is 0.
        """
        means, chain = [0.0], 1.0
        for trials, hits in zip(self.trials, self.hits, strict=True):
            chain *= _lower(hits, trials, deviations)
            means.append(means[-1] + chain)
        return means

    def chain(self, believed: Sequence[float], weight: float) -> list[float]:
        """Chance that drafts 0..i are all accepted, for each i.

        Args:
            believed: prior chance of each token, given those before it.
            weight: number of verdicts that this prior is worth.
        """
        chances, chance = [], 1.0
        for trials, hits, belief in zip(self.trials, self.hits, believed, strict=True):
            chance *= (hits + weight * belief) / (trials + weight)
            chances.append(chance)
        return chances


@dataclass
class AcceptanceEstimate:
    """Chance that the draft's token i is accepted given that those before it were, from live verdicts and, as a prior,
    from the learner's simulation (the "shadow").

    Args:
        positions: largest draft length.
        prior: conditional chance to assume before there is any evidence; 0 for an untried draft.
    """

    positions: int
    prior: float = 0.0
    _live: Acceptance = field(init=False)
    _shadow: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._live = Acceptance(self.positions)
        self._shadow = [self.prior] * self.positions

    def take(self, verdicts: Verdicts) -> None:
        """Several verdicts of unknown order."""
        self._live.take(verdicts)

    def forget(self) -> None:
        """Time went by without verdicts: let the shadow count for more."""
        self._live.fade(WEIGHT_AFTER_A_REST)

    def new_version(self) -> None:
        """Other weights are live: let the older ones' verdicts count for less."""
        self._live.fade(WEIGHT_OF_OLDER_VERSION)

    def shadow(self, accepted_per_position: Sequence[float]) -> None:
        """The learner's simulation of the live weights: share of steps in which drafts 0..i were all accepted."""
        self._shadow = _conditional(accepted_per_position[: self.positions])

    def chain(self) -> list[float]:
        """Chance that drafts 0..i are all accepted, for each i."""
        return self._live.chain(self._shadow, SHADOW_WEIGHT)

    def expected_length(self, draft_length: int) -> float:
        """Mean tokens gained per verification with K drafts, the bonus token included (vLLM's acceptance length)."""
        return 1.0 + sum(self.chain()[:draft_length])


def _conditional(shares: Sequence[float]) -> list[float]:
    """Chance of each draft given those before it, from the share of steps in which drafts 0..i were all accepted."""
    chances, before = [], 1.0
    for share in shares:
        chances.append(min(share / before, 1.0) if before > 0 else 0.0)
        before = share
    return chances


def _lower(hits: float, trials: float, z: float) -> float:
    if not trials:
        return 0.0
    share, zz = hits / trials, z * z / trials
    spread = z * math.sqrt(share * (1.0 - share) / trials + zz / (4.0 * trials))
    return max(0.0, (share + zz / 2.0 - spread) / (1.0 + zz))
