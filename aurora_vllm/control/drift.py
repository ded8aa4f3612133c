"""When learning stops because it no longer helps, and when it starts again. Numbers in, decisions out.

**Asleep when it does not help.** That candidates beat incumbents proves nothing: the margin is small against the noise
of some hundred tokens, so versions are published for ever, each compared with one that is hardly older. A trial does
prove it: the draft is set aside as it is, and compared with what a number of optimizer steps make of it, both on the
same trajectories before either was trained on them. Traffic that becomes harder is harder for both.

**Awake when acceptance drops.** The incumbent's acceptance, on a sample of the traffic, goes through Page's test for a
drop of the mean (Page, "Continuous inspection schemes", Biometrika 1954; river's PageHinkley). One observation is a
whole request, because the verdicts within one resemble each other; the unit is the standard deviation over requests
during the trial. In simulation (requests differ by 0.1 in the chance that a draft is accepted, 0.6 on average) one
learner in five wakes without cause within 1,500 observations; a chance that falls to 0.45 is detected after 12
observations (median; 95th percentile 50), one that falls to 0.35 after 6. A false alarm costs a trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

TRIAL_STEPS = 40  # optimizer steps before a trial is judged: after a lesson the first 25 train lm_head only
TRIAL_EVIDENCE = 5  # times as many tokens as a publish is judged on
MEANINGFUL = 0.03  # gain in acceptance length that justifies learning, which costs two cores several per cent

OBSERVATION = 40  # least verifications of one observation; a request with more is one observation, too
WATCH_EVERY = 4  # one of that many requests is simulated
ALLOWANCE, ALARM = 0.5, 8.0  # Page's delta and lambda, in spreads: the drop that is tolerated, and the sum at alarm
LEAST_SPREAD = 0.1  # of accepted drafts, where the trial saw too few requests to estimate it
COVERAGE_DROP = 0.05  # share of the traffic that leaves the draft vocabulary
TRY_AGAIN_TOKENS = 200_000  # then another trial, for what no test sees (slow change; a draft that accepts nothing)

Decision = Literal["undecided", "goes on", "sleeps"]


class Trial:
    """Whether training helps: compares a draft that was set aside with what training makes of it.

    Args:
        steps: optimizer steps so far.
        evidence_tokens: response tokens a publish is judged on.
    """

    def __init__(self, steps: int, evidence_tokens: int) -> None:
        self._judged_from = steps + TRIAL_STEPS
        self._least_tokens = TRIAL_EVIDENCE * evidence_tokens
        self._then, self._now = [0, 0], [0, 0]  # verifications, accepted drafts

    def is_judged(self, steps: int) -> bool:
        """Whether there was enough training, so that scores count."""
        return steps >= self._judged_from

    def observe(self, then: tuple[int, int], now: tuple[int, int]) -> None:
        """One trajectory. then, now: verifications and accepted drafts, of the one set aside and the other."""
        for total, score in ((self._then, then), (self._now, now)):
            total[0] += score[0]
            total[1] += score[1]

    @property
    def tokens(self) -> int:
        """Response tokens it was judged on so far."""
        return sum(self._then)

    @property
    def gain(self) -> float:
        """Acceptance length won by training."""
        return acceptance_length(*self._now) - acceptance_length(*self._then)

    @property
    def decision(self) -> Decision:
        if self.tokens < self._least_tokens:
            return "undecided"
        return "goes on" if self.gain >= MEANINGFUL else "sleeps"

    def reason(self, steps: int) -> str:
        """The decision in words. steps: optimizer steps so far."""
        if not self.is_judged(steps):
            return f"awake: on trial, {TRIAL_STEPS - self._judged_from + steps} of {TRIAL_STEPS} steps trained"
        if self.decision == "undecided":
            return f"awake: on trial, judged on {self.tokens} of {self._least_tokens} response tokens"
        lengths = f"{acceptance_length(*self._then):.2f} to {acceptance_length(*self._now):.2f}"
        trained = f"{TRIAL_STEPS + steps - self._judged_from} steps of training took acceptance length from {lengths}"
        return f"{'awake' if self.decision == 'goes on' else 'sleeps'}: {trained}"


class AcceptanceWatch:
    """Whether the traffic became harder for a draft that is not being trained.

    Args:
        usual: accepted drafts per verification of each request during the trial.
        coverage: share of the traffic in the draft vocabulary now.
        tokens: tokens seen so far.
    """

    def __init__(self, usual: Sequence[float], coverage: float, tokens: int) -> None:
        # Imported here: river brings scipy, which takes 0.6 CPU seconds and 65 MiB, and a learner that never sleeps
        # does not need it.
        from river.drift import PageHinkley

        self._spread = max(stdev(usual) if len(usual) > 1 else 0.0, LEAST_SPREAD)
        self._usual = fmean(usual) if usual else 0.0
        self._coverage, self._tokens = coverage, tokens
        self._test = PageHinkley(min_instances=1, delta=ALLOWANCE, threshold=ALARM, alpha=1.0, mode="down")
        for value in usual:
            self._test.update(value / self._spread)
        self._recent: deque[float] = deque(maxlen=5)
        self._verifications = self._accepted = 0
        self._wait = 0

    def next_is_due(self) -> bool:
        """Whether to simulate the next request: one in a few, and the one after a bad one. Call once for each."""
        self._wait -= 1
        return self._wait < 0

    def observe(self, verifications: int, accepted: int) -> str:
        """One simulated request. Returns why to wake; empty where there is no reason."""
        self._verifications += verifications
        self._accepted += accepted
        self._wait = WATCH_EVERY - 1
        if self._verifications < OBSERVATION:
            return ""
        value = self._accepted / self._verifications
        self._verifications = self._accepted = 0
        self._recent.append(value)
        if value < self._usual - self._spread:
            self._wait = 0
        self._test.update(value / self._spread)
        if not self._test.drift_detected:
            return ""
        return f"woke: acceptance length fell from {1 + self._usual:.2f} to {1 + fmean(self._recent):.2f}"

    def traffic(self, coverage: float, tokens: int) -> str:
        """The share covered by the draft vocabulary, and tokens seen so far. Returns why to wake, as above."""
        if coverage < self._coverage - COVERAGE_DROP:
            return f"woke: the draft vocabulary covers {coverage:.2f} of the traffic, it was {self._coverage:.2f}"
        if tokens - self._tokens >= TRY_AGAIN_TOKENS:
            return f"woke: to try again after {tokens - self._tokens} tokens"
        return ""


def acceptance_length(verifications: int, accepted: int) -> float:
    """Mean tokens a verification, bonus token included; 1 without evidence."""
    return 1.0 + accepted / verifications if verifications else 1.0
