"""Whether a new version of the draft stays: a sequential test of its verdicts against those of the version before.

A published version won a simulation on the learner's copy. Live it may still be worse (corrupted bytes, other kernels,
a draft that was pushed), so it is on probation for its first verified drafts. All versions have the same shapes, so a
step with K drafts costs the same whichever proposed them. At equal K, therefore, tokens per second depend on acceptance
alone, which unlike time is not disturbed by load, and so acceptance is compared. Numbers in, decisions out: no vLLM, no
torch.

**The test.** The verdict on one request's K drafts is the number accepted, a in 0..K. The older version's verdicts give
a lower bound b(K) of its mean. As long as the new version's mean is at least b(K), whatever the past, a gambler who
bets on "less" multiplies his wealth by ``1 - s (a - b(K))``, s <= 1 / (K - b(K)), and expects no gain. The probability
that his wealth ever reaches w is then at most 1/w (Ville's inequality; Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", JRSS B 2024). It may be looked at after every verdict, and K may change in
between; reaching w is the evidence. The probability of a false alarm, 1 - confidence, is split in halves between the
gambler's luck and the bound.

**Limits.** The two versions' verdicts are not of the same time: traffic may have become harder. Verdicts of one request
resemble each other. And for a while the new weights read draft KV that the old ones wrote. Hence the margin, a minimum
number of verdicts, and an end of probation, after which a change of traffic can no longer be blamed on the version. A
regression smaller than the margin is left to the learner.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

from aurora_vllm.control.acceptance import Acceptance

PROBATION_DRAFTS = 400  # verified drafts after which a version that was not found worse stays
LEAST_DRAFTS = 60  # verified drafts before a decision, so that they come from more than one or two requests
MARGIN = 0.15  # share of the older version's accepted drafts that a new one may lose
STAKES = (0.25, 0.5, 0.9)  # of the largest s; the wealth is the mean of three gamblers' with different stakes

Decision = Literal["undecided", "keep", "rollback"]


class Probation:
    """Tests one version against the verdicts on the one before.

    Args:
        previous: the older version's verdicts, read once.
        confidence: in 0..1, that a rollback requires.
    """

    def __init__(self, previous: Acceptance, confidence: float) -> None:
        doubt = (1.0 - confidence) / 2.0
        self._usual = previous.accepted()
        deviations = NormalDist().inv_cdf(1.0 - doubt / previous.positions)  # all positions' bounds hold at once
        self._bound = [(1.0 - MARGIN) * mean for mean in previous.accepted(deviations)]
        self._enough = 1.0 / doubt
        self._wealth = [1.0] * len(STAKES)
        self.drafts = 0
        self._accepted = self._expected = 0.0
        self.decision: Decision = "undecided"

    @property
    def evidence(self) -> float:
        """Wealth of the test martingale: at 2 / (1 - confidence) the version is rolled back; above 1 it looks worse."""
        return sum(self._wealth) / len(STAKES)

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """One request's verdict. Ignored after a decision."""
        if self.decision != "undecided":
            return
        drafts = min(num_drafts, len(self._bound) - 1)
        if not drafts:
            return
        accepted = min(num_accepted, drafts)
        bound = self._bound[drafts]
        for i, stake in enumerate(STAKES):
            self._wealth[i] *= 1.0 - stake * (accepted - bound) / (drafts - bound)
        self.drafts += 1
        self._accepted += accepted
        self._expected += self._usual[drafts]
        if self.drafts >= LEAST_DRAFTS and self.evidence >= self._enough:
            self.decision = "rollback"
        elif self.drafts >= PROBATION_DRAFTS:
            self.decision = "keep"

    @property
    def comparison(self) -> str:
        """Both acceptance lengths, in words; the older version's at the draft lengths of the new one's verdicts."""
        drafts = max(self.drafts, 1)
        return (
            f"acceptance length {1 + self._accepted / drafts:.2f}, {1 + self._expected / drafts:.2f} before, "
            f"over {self.drafts} verified drafts"
        )


class Rollout:
    """Follows the versions that draft, and decides whether the newest one stays.

    Args:
        positions: largest draft length.
        confidence: that a version is worse, at which it is rolled back; 0: never.
    """

    def __init__(self, positions: int, confidence: float) -> None:
        self._positions, self._confidence = positions, confidence
        self._known: dict[int, Acceptance] = {}
        self._newest = 0
        self._previous = 0
        self._probation: Probation | None = None

    def observe(self, version: int, previous: int, num_drafts: int, num_accepted: int) -> None:
        """One request's verdict.

        Args:
            version: of the weights that proposed the drafts.
            previous: the version that a rollback would return to.
        """
        if version > self._newest:  # not for one that came back by a rollback: it has been on probation before
            self._begin(version, previous)
        self._known.setdefault(version, Acceptance(self._positions)).observe(num_drafts, num_accepted)
        if self._probation is not None and version == self._newest:
            self._probation.observe(num_drafts, num_accepted)

    def _begin(self, version: int, previous: int) -> None:
        before = self._known.get(previous)
        self._known = {} if before is None else {previous: before}
        self._newest, self._previous = version, previous
        self._probation = Probation(before, self._confidence) if before is not None and self._confidence else None

    @property
    def version(self) -> int:
        """The newest version that drafted; 0 before the first."""
        return self._newest

    @property
    def drafts(self) -> int:
        """Verified drafts of its probation so far."""
        return self._probation.drafts if self._probation else 0

    @property
    def evidence(self) -> float:
        """Evidence that it is worse than the one before, see :attr:`Probation.evidence`; 0 without probation."""
        return self._probation.evidence if self._probation else 0.0

    @property
    def decision(self) -> Decision:
        """The decision on the newest version."""
        if self._probation is not None:
            return self._probation.decision
        return "keep" if self._newest else "undecided"

    @property
    def looks_worse(self) -> bool:
        """Whether it is undecided, and more verdicts would probably lead to a rollback."""
        return self.decision == "undecided" and self.evidence > 1.0

    @property
    def reason(self) -> str:
        """The decision in words."""
        if not self._newest:
            return "nothing was drafted yet"
        name = f"version {self._newest}"
        if not self._confidence:
            return f"{name} stays: rollback is switched off by the settings"
        if self._probation is None:
            # The version before did not pay, so it was never used; there is nothing to go back to.
            return f"{name} is not on probation: no verdicts of a version before it"
        comparison = self._probation.comparison
        if self.decision == "rollback":
            sure = f"worse than version {self._previous} at confidence {self._confidence:g}"
            return f"{name} is {sure}: {comparison}"
        if self.decision == "keep":
            return f"{name} stays, not found worse than version {self._previous}: {comparison}"
        return f"{name} is on probation against version {self._previous}: {comparison}"
