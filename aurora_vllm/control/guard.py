"""Bounds what learning adds to the time per output token, by cutting the learner's share.

Steps during a burst of the learner's work are compared with steps without one, at equal batch bucket and draft length,
so that acceptance and load are the same. Both kinds alternate within a window of some hundred steps, so whatever slows
the machine for longer slows both. What learning adds is the slowdown of such a step times the share of steps that are
slowed: the increase for a request that meets bursts as often as requests do on average. It falls with the learner's
share, which is what can be cut. Two quantiles are compared, and the worse one counts: the median and the 90th
percentile, because waiting for a CPU shows in the tail first. (The 99th would need thousands of steps during bursts; a
window has dozens.) Numbers in, decisions out: no vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aurora_vllm.control.step_costs import batch_bucket

WINDOW = 512  # steps between two decisions
LONGEST_WINDOW = 8 * WINDOW  # where bursts are rare; if they still are too few by then, they do not matter
LEAST_WORKING = 24  # steps during bursts that a decision needs
LEAST_RESTING = 12  # steps of one kind without a burst that their median needs
TAIL = 0.9
CUT, RESTORE, FLOOR = 0.5, 1.25, 0.25


@dataclass
class LearnerGuard:
    """Halves the learner's share while it slows serving too much, and restores it in small steps.

    Args:
        limit: the most that learning may add to the time per output token, as a share of it.

    Attributes:
        share: factor on the learner's share, in FLOOR..1.
        slowdown: what learning added in the last window, as a share of the time per output token; 0 before.
        reason: the last decision in words.
    """

    limit: float
    share: float = 1.0
    slowdown: float = 0.0
    reason: str = "measuring steps with and without the learner"
    _steps: list[tuple[int, int, float, bool]] = field(default_factory=list)
    _working: int = 0

    def observe(self, batch_size: int, draft_length: int, seconds: float, working: bool) -> bool:
        """One decode step without a prompt. Returns whether a decision was made.

        Args:
            working: whether the learner was in a burst of work during the step.
        """
        self._steps.append((batch_size, draft_length, seconds, working))
        self._working += working
        count = len(self._steps)
        if count < WINDOW or (self._working < LEAST_WORKING and count < LONGEST_WINDOW):
            return False
        self._decide(*relative_times(self._steps))
        self._steps, self._working = [], 0
        return True

    def _decide(self, resting: Sequence[float], working: Sequence[float]) -> None:
        """resting, working: step times relative to the usual step of the same kind without the learner."""
        if len(working) < LEAST_WORKING or len(resting) < LEAST_RESTING:
            what = "hardly works" if len(resting) >= LEAST_RESTING else "hardly rests"
            # Where the learner never rests there is nothing to compare with, so nothing is changed.
            self.slowdown, restore = 0.0, what == "hardly works"
            because = f"the learner {what} beside steps that can be compared"
        else:
            typical = quantile(working, 0.5) / quantile(resting, 0.5) - 1.0
            tail = quantile(working, TAIL) / quantile(resting, TAIL) - 1.0
            beside = len(working) / (len(working) + len(resting))
            self.slowdown = beside * max(typical, tail, 0.0)
            restore = self.slowdown * RESTORE < self.limit
            because = (
                f"learning adds {self.slowdown:.1%} to the time per output token, {self.limit:.1%} are allowed "
                f"(median {typical:+.0%}, 90th percentile {tail:+.0%}, beside {beside:.0%} of steps)"
            )
        if self.slowdown > self.limit:
            self.share = max(FLOOR, self.share * CUT)
        elif restore:
            self.share = min(1.0, self.share * RESTORE)
        self.reason = f"{self.share:.2f} of its share: {because}"


def relative_times(steps: Sequence[tuple[int, int, float, bool]]) -> tuple[list[float], list[float]]:
    """Step times relative to the median step of the same batch bucket and draft length without the learner.

    Kinds with too few such steps are left out.

    Args:
        steps: batch size, draft length, seconds, whether the learner worked.

    Returns:
        Those without the learner, and those during its bursts.
    """
    kinds: dict[tuple[int, int], tuple[list[float], list[float]]] = {}
    for batch_size, draft_length, seconds, working in steps:
        kinds.setdefault((batch_bucket(batch_size), draft_length), ([], []))[working].append(seconds)
    resting: list[float] = []
    beside: list[float] = []
    for without, with_it in kinds.values():
        if len(without) >= LEAST_RESTING and (usual := quantile(without, 0.5)) > 0:
            resting += [seconds / usual for seconds in without]
            beside += [seconds / usual for seconds in with_it]
    return resting, beside


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
