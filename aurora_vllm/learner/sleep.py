"""A learner that sleeps: it looks at a sample of the traffic and does nothing else, until it is needed again.

When to sleep and when to wake is decided in control/drift.py. Here is what that needs: the draft as it was when the
trial began, and the incumbent's scores.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import TYPE_CHECKING

from aurora_vllm.control.drift import AcceptanceWatch, Trial
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Score
from aurora_vllm.learner.trajectory import Trajectory

if TYPE_CHECKING:
    from aurora_vllm.learner.learner import Learner

IDLE_S, ASLEEP_S = 0.05, 0.25  # between two looks into the ring where there is no work
RECENT_REQUESTS = 200  # of the trial, that say what is usual
NEW_TOKENS = 4096  # what arrived just before a wake-up is most likely of the new kind, and is trained on


class Sleep:
    """Puts a learner to sleep where training no longer helps, and wakes it.

    Args:
        learner: whose drafts they are. With unjudged publishing (``sync``) it never sleeps: that promises steps.
    """

    def __init__(self, learner: Learner) -> None:
        config = learner.config
        self._learner = learner
        self._wanted = config.learner_sleep and config.sync == "evidence"
        self._trial: Trial | None = None
        self._set_aside: Eagle3Draft | None = None
        self._usual: deque[float] = deque(maxlen=RECENT_REQUESTS)
        self._watch: AcceptanceWatch | None = None
        self._say("awake" if self._wanted else "never sleeps, by the settings")

    @property
    def asleep(self) -> bool:
        return self._watch is not None

    @property
    def idle_s(self) -> float:
        """How long to wait where there is no work."""
        return ASLEEP_S if self.asleep else IDLE_S

    def restart(self, why: str) -> None:
        """Other drafts than those known here: awake, and another trial. why: in words."""
        self._trial = self._set_aside = None
        self._usual.clear()
        if self.asleep:
            self._wake(f"woke: {why}")

    def scored(self, trajectory: Trajectory, candidate: Score, incumbent: Score) -> None:
        """Both drafts on a trajectory, while awake: the trial goes on, begins or ends."""
        learner, curriculum = self._learner, self._learner.curriculum
        if not self._wanted or curriculum.has_lessons_to_learn:
            return
        steps = curriculum.trainer.steps
        if self._trial is None or self._set_aside is None:
            self._trial = Trial(steps, learner.config.evidence_tokens)
            self._set_aside = copy.deepcopy(learner.drafts.candidate)
        elif self._trial.is_judged(steps):
            then = learner.simulated(self._set_aside, trajectory)
            if then is not None:
                self._trial.observe(_counts(then), _counts(candidate))
            if incumbent.steps:
                self._usual.append(incumbent.acceptance_length - 1.0)
        self._say(self._trial.reason(steps))
        learner.control.learner.trial_gain = self._trial.gain
        if self._trial.decision == "undecided":
            return
        sleeps = self._trial.decision == "sleeps"
        self._trial = self._set_aside = None
        if sleeps:
            self._watch = AcceptanceWatch(self._usual, self._coverage(), curriculum.tokens_seen)
            learner.control.learner.sleeps += 1
            learner.control.learner.asleep = True
        self._usual.clear()

    def turn(self) -> bool:
        """In place of a turn of the learner, while asleep. Returns whether something was looked at."""
        learner = self._learner
        while learner.unscored and self._watch is not None:
            trajectory, why = learner.unscored.popleft(), ""
            due = self._watch.next_is_due()
            if due and (score := learner.simulated(learner.drafts.incumbent, trajectory)) is not None:
                learner.show_live(score)
                why = self._watch.observe(*_counts(score))
            learner.remember(trajectory)  # another vocabulary may wake it
            if self._watch is not None:
                why = why or self._watch.traffic(self._coverage(), learner.curriculum.tokens_seen)
                if why:
                    self._wake(why)
            if due:
                return True
        return False

    def _wake(self, why: str) -> None:
        self._watch = None
        self._learner.evidence.restart()  # of other traffic; nothing was added while asleep
        self._learner.curriculum.owe(NEW_TOKENS)
        self._learner.control.learner.asleep = False
        self._say(why)

    def _coverage(self) -> float:
        return self._learner.curriculum.coverage.share(self._learner.drafts.incumbent.target_ids)

    def _say(self, what: str) -> None:
        block = self._learner.control.learner
        if block.sleep != what:
            block.sleep = what


def _counts(score: Score) -> tuple[int, int]:
    return score.steps, sum(score.accepted)
