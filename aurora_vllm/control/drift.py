"""When learning stops because it no longer helps, and when it begins again. Numbers in, decisions out.

**Asleep when it does not help.** Whether candidates beat incumbents does not tell: the margin is small against the
noise of some hundred tokens, so versions go out for ever, each compared with one that is hardly older. What tells is a
trial: the draft as it is, set aside, against what becomes of it in so many optimizer steps, both on the same
trajectories, before either trained on them. Traffic that becomes harder is harder for both.

**Awake when acceptance drops.** The incumbent's acceptance, on a sample of the traffic, goes through Page's test for a
drop of the mean (Page, "Continuous inspection schemes", Biometrika 1954; river's PageHinkley). One observation is a
whole request, because the verdicts within one resemble each other, in units of the spread that requests had during the
trial. In simulation (requests differ by 0.1 in the chance that a draft is accepted, 0.6 on average) one learner in
five wakes without cause within 1,500 observations; a chance that falls to 0.45 is found after 12 observations (median;
50 in 95 of 100), one that falls to 0.35 after 6. A wrong alarm costs a trial.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

TRIAL_STEPS = 40  # optimizer steps before a trial is judged: behind a lesson the first 25 train the head alone
TRIAL_EVIDENCE = 5  # times what a publish is judged on
MEANINGFUL = 0.03  # acceptance length to be gained by a trial; two cores pay several per cent of their rate for it

OBSERVATION = 40  # verifications of one observation; a request that has more is one all the same
WATCH_EVERY = 4  # of that many requests one is looked at
ALLOWANCE, ALARM = 0.5, 8.0  # spreads: a smaller drop is none, and how far the sum of larger ones must get
LEAST_SPREAD = 0.1  # of accepted drafts, where the trial saw too few requests to tell
COVERAGE_DROP = 0.05  # share of the traffic that leaves the draft vocabulary
TRY_AGAIN_TOKENS = 200_000  # what no test sees (a slow change; a draft that has nothing to lose) gets another trial

Decision = Literal["undecided", "goes on", "sleeps"]


class Trial:
    """Whether training helps: a draft that is set aside against what becomes of it.

    Args:
        steps: optimizer steps so far.
        evidence_tokens: response tokens a publish is judged on.
    """

    def __init__(self, steps: int, evidence_tokens: int) -> None:
        self._judged_from = steps + TRIAL_STEPS
        self._least_tokens = TRIAL_EVIDENCE * evidence_tokens
        self._then, self._now = [0, 0], [0, 0]  # verifications, accepted drafts

    def is_judged(self, steps: int) -> bool:
        """Whether there was enough training: scores count from now on."""
        return steps >= self._judged_from

    def observe(self, then: tuple[int, int], now: tuple[int, int]) -> None:
        """One trajectory. then, now: verifications and accepted drafts, of the draft set aside and of the other."""
        for total, score in ((self._then, then), (self._now, now)):
            total[0] += score[0]
            total[1] += score[1]

    @property
    def tokens(self) -> int:
        """Response tokens it was judged on."""
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
    """Whether the traffic became harder for a draft that nobody trains.

    Args:
        usual: accepted drafts a verification, of requests so far.
        coverage: share of the traffic in the draft vocabulary now.
        tokens: seen so far.
    """

    def __init__(self, usual: Sequence[float], coverage: float, tokens: int) -> None:
        # Here, not above: river brings scipy, 0.6 CPU seconds and 65 MiB, and a learner that never sleeps needs none.
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
        """Whether the next request is looked at: one in a few, and the one after a bad one. Call once for each."""
        self._wait -= 1
        return self._wait < 0

    def observe(self, verifications: int, accepted: int) -> str:
        """One request that was looked at. Why to wake; empty where there is no reason."""
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
        """The share covered by the draft vocabulary, and tokens seen so far. Why to wake, as above."""
        if coverage < self._coverage - COVERAGE_DROP:
            return f"woke: the draft vocabulary covers {coverage:.2f} of the traffic, it was {self._coverage:.2f}"
        if tokens - self._tokens >= TRY_AGAIN_TOKENS:
            return f"woke: to try again after {tokens - self._tokens} tokens"
        return ""


def acceptance_length(verifications: int, accepted: int) -> float:
    """Mean tokens a verification, bonus token included; 1 without evidence."""
    return 1.0 + accepted / verifications if verifications else 1.0
