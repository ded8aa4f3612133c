"""The learner's sleep: until it is needed again, it only scores a sample of the traffic.

control/drift.py decides when to sleep and when to wake. This module provides what that needs: the draft as it was at
the start of the trial, and the incumbent's scores.
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
RECENT_REQUESTS = 200  # of the trial, which define the usual acceptance
NEW_TOKENS = 4096  # rows before a wake-up that are trained on: they are most likely the new kind of traffic


class Sleep:
    """Puts a learner to sleep where training no longer helps, and wakes it.

    Args:
        learner: to be put to sleep. With unjudged publishing (``sync``) it never sleeps, because that promises steps.
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
        """Seconds to wait when there is no work."""
        return ASLEEP_S if self.asleep else IDLE_S

    def restart(self, why: str) -> None:
        """The drafts were replaced: wake, and begin another trial. why: in words."""
        self._trial = self._set_aside = None
        self._usual.clear()
        if self.asleep:
            self._wake(f"woke: {why}")

    def scored(self, trajectory: Trajectory, candidate: Score, incumbent: Score) -> None:
        """While awake, both drafts' scores on a trajectory: begins, continues or ends a trial."""
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
        """Replaces a turn of the learner while it sleeps. Returns whether a trajectory was scored."""
        learner = self._learner
        while learner.unscored and self._watch is not None:
            trajectory, why = learner.unscored.popleft(), ""
            due = self._watch.next_is_due()
            if due and (score := learner.simulated(learner.drafts.incumbent, trajectory)) is not None:
                learner.show_live(score)
                why = self._watch.observe(*_counts(score))
            learner.remember(trajectory)  # this wakes it if the vocabulary changes
            if self._watch is not None:
                why = why or self._watch.traffic(self._coverage(), learner.curriculum.tokens_seen)
                if why:
                    self._wake(why)
            if due:
                return True
        return False

    def _wake(self, why: str) -> None:
        self._watch = None
        self._learner.evidence.restart()  # it is from before the sleep, so from other traffic
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
