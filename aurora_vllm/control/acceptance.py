"""Which drafts the target accepted, by position. Numbers in, numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WINDOW = 600.0  # verified drafts remembered: the newest say most about the traffic of now


@dataclass
class Acceptance:
    """Live verdicts: how often draft i was accepted where those before it were, older ones for less.

    ``trials`` and ``hits`` are weighted counts, one a position.
    """

    positions: int
    trials: list[float] = field(init=False)
    hits: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.trials, self.hits = [0.0] * self.positions, [0.0] * self.positions

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """One request's verdict in one step."""
        for i in range(min(num_drafts, num_accepted + 1, self.positions)):
            keep = 1.0 - 1.0 / WINDOW
            self.trials[i] = self.trials[i] * keep + 1.0
            self.hits[i] = self.hits[i] * keep + (num_accepted > i)

    def fade(self, weight: float) -> None:
        """What was counted so far says less now."""
        self.trials, self.hits = ([count * weight for count in counts] for counts in (self.trials, self.hits))

    def accepted(self, deviations: float = 0.0) -> list[float]:
        """Mean accepted drafts of a verification with K drafts, for K = 0..positions.

        Args:
            deviations: standard deviations by which each chance is taken lower (Wilson's score bound); 0 without
                verdicts.
        """
        means, chain = [0.0], 1.0
        for trials, hits in zip(self.trials, self.hits, strict=True):
            chain *= _lower(hits, trials, deviations)
            means.append(means[-1] + chain)
        return means


def _lower(hits: float, trials: float, z: float) -> float:
    if not trials:
        return 0.0
    share, zz = hits / trials, z * z / trials
    spread = z * math.sqrt(share * (1.0 - share) / trials + zz / (4.0 * trials))
    return max(0.0, (share + zz / 2.0 - spread) / (1.0 + zz))
