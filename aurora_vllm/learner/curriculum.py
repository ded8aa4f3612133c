"""What the draft in training goes through: a vocabulary that fits the traffic, lessons in closed form, gradient steps.

One piece of work at a time, so that the learner can take what arrives and keep to its share of the CPU in between. Also
what ``benchmarks.learning`` measures, without a server around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.averaging import WeightAverage
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.host_lesson import HostLesson
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.lesson_shape import is_due
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.remap import plan_move
from aurora_vllm.learner.replay import Replay
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.learner.vocabulary import Coverage, Reselection
from aurora_vllm.transport.placement import CPU

# A lesson whenever this many rows were seen: each is better than the one before, and the early ones are cheap. By hand,
# SmolLM2-135M and GSM8K: twelve requests in a row had a mean acceptance length of 1.5 after 3,547 tokens (two seeds);
# after 4,399 without the lesson at 2,048 (two seeds), after 5,204 with the first at 3,072 (one).
LESSON_ROWS = (1024, 2048, 4096, 16_384)
LESSON_REQUESTS = 6
LARGEST_LESSON_ROWS = 16_384  # the newest ones; a lesson costs in proportion to them

Work = Literal["", "first lesson", "lesson", "training"]
_OVER = object()  # in place of what a finished generator yields


class Curriculum:
    """Trains ``candidate``: what it holds is the average of the draft in training (averaging.py).

    Args:
        candidate: a day-0 draft, one that somebody trained, or one that goes on from earlier work.
        head: the target's embedding and lm_head.
        config: settings.
        target: directory of the target, for its tokenizer's order of tokens.
        worth_keeping: the draft has been trained before, so it is refined from the first step on.

    Attributes:
        tokens_seen, tokens_trained: rows of trajectories.
        vocabulary_changes: times the vocabulary was chosen anew.
        dropped: trajectories that broke a training step.
        fault: why the newest piece of work came to nothing; empty where it did not.
        loss: of the newest training step.
        teacher: gives the lessons that are still to come, if any.
    """

    def __init__(
        self, candidate: Eagle3Draft, head: TargetHead, config: AuroraConfig, target: Path, worth_keeping: bool
    ) -> None:
        self.candidate, self._head, self._config = candidate, head, config
        self.replay = Replay(config.replay_mb << 20, seed=config.seed)
        is_release = config.semantics == "aurora-release"
        self._average = WeightAverage(candidate, 0.0 if is_release else config.weight_average)
        self.trainer = Trainer(
            self._average.trained,
            head,
            config.learning_rate,
            config.ttt_length,
            semantics=config.semantics,
            prompt_weight=0.0 if is_release else config.prompt_weight,
            objective=Objective(config.objective, config.discard_weight, config.discard_top_k),
        )
        self.coverage = Coverage(candidate.config.vocab_size)
        self._reselection = Reselection(target, config.vocabulary_coverage)
        teachable = not worth_keeping and is_due(candidate)
        self._lessons_due = list(LESSON_ROWS) if teachable else []
        self.teacher: Lesson | HostLesson | None = None
        if teachable:
            self.teacher = (Lesson if head.device == CPU else HostLesson)(candidate, head)
        self._lesson: Iterator[None] | None = None
        if worth_keeping:
            self.refine()
        self.tokens_seen = self.tokens_trained = self.vocabulary_changes = self.dropped = 0
        self._owed = 0.0  # rows to be trained on yet, those of all passes together
        self.fault = ""
        self.loss = 0.0

    @property
    def awaits_first_lesson(self) -> bool:
        """Whether gradient steps wait for the first lesson."""
        return len(self._lessons_due) == len(LESSON_ROWS)

    @property
    def has_lessons_to_learn(self) -> bool:
        """Whether a lesson is still to come, or under way."""
        return bool(self._lessons_due) or self._lesson is not None

    def refine(self) -> None:
        """The candidate is a trained one now, whoever trained it: no lessons, gentle steps from where it is."""
        self.skip_lessons()
        self._average.restart()
        self.trainer.refine()

    def go_on(self) -> None:
        """The candidate has other weights now, of whatever vocabulary: on from there. The optimizer's state stays."""
        self._average.restart()
        if self.teacher is not None:
            self.teacher.start_over()

    def skip_lessons(self) -> None:
        """Go on with gradient steps alone; a lesson under way is given up."""
        self._lessons_due, self._lesson, self.teacher = [], None, None

    def add(self, trajectory: Trajectory, owed: bool = True) -> bool:
        """Take a trajectory that may be learned from. Returns whether the candidate got another vocabulary.

        Args:
            owed: whether training has to keep up with it.
        """
        self.fault = ""
        passes = self._config.replay_passes if owed else 0.0
        with self._forgetting():
            is_held = self.replay.add(trajectory, passes)
        self._owed += passes * len(trajectory.token_ids) if is_held else 0.0
        self.tokens_seen += len(trajectory.token_ids)
        self.coverage.observe(trajectory.response_ids)
        chosen = self._reselection.propose(self.coverage, self.candidate.target_ids)
        if chosen is None:
            return False
        try:
            moves = [plan_move(self.trainer.draft, self._head, chosen, self.trainer.optimizer)]
            if self.trainer.draft is not self.candidate:
                moves.append(plan_move(self.candidate, self._head, chosen))
        except RuntimeError as error:
            self.fault = f"{type(error).__name__.lstrip('_')} in a change of vocabulary: it stays as it is"
            return False
        for move in moves:
            move()
        self.vocabulary_changes += 1
        return True

    def owe(self, tokens: int) -> None:
        """Make the newest rows, about `tokens` of them, due for training after all: they arrived while it slept."""
        self._owed += self.replay.make_due(tokens, self._config.replay_passes)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Around what takes trajectories out of the replay: nothing is owed to what is gone.

        Nor is that made up for by the rest, which may have been drawn in its place: never less than nothing is owed.
        """
        missed = self.replay.missed
        yield
        if self._owed > 0:
            self._owed = max(0.0, self._owed - (self.replay.missed - missed))

    def next(self) -> Work:
        """What the next piece of work is; empty where there is none."""
        if self._lesson is not None or self._lesson_is_due():
            return "first lesson" if self.awaits_first_lesson else "lesson"
        if self.awaits_first_lesson or not len(self.replay):
            return ""
        return "training" if self._owed > 0 else ""

    @property
    def works_on_host(self) -> bool:
        """Whether that piece is one of a lesson for a draft on a GPU, which needs none of it."""
        return isinstance(self.teacher, HostLesson) and self.next() not in ("", "training")

    def work(self) -> bool:
        """Do that piece. Returns whether the candidate is another one now, so that older scores say nothing of it."""
        what, self.fault = self.next(), ""
        if what == "training":
            self._train()
        elif what:
            return self._study()
        return False

    def _lesson_is_due(self) -> bool:
        if not self._lessons_due or not len(self.replay):
            return False
        if self.replay.evicted:  # it holds no more than this, so there is nothing to wait for
            return True
        return len(self.replay) >= LESSON_REQUESTS and self.replay.tokens >= self._lessons_due[0]

    def _study(self) -> bool:
        assert self.teacher is not None
        begins = self._lesson is None
        if self._lesson is None:
            self._lesson = self.teacher.run(self.replay.newest(LARGEST_LESSON_ROWS))
        try:
            if next(self._lesson, _OVER) is not _OVER:
                return False
        except (RuntimeError, ValueError, IndexError) as error:
            self.fault = f"{type(error).__name__.lstrip('_')} in a lesson: learning goes on without it"
        else:
            self.fault = "there was nothing to learn a lesson from" if begins else ""
        self._lesson_ends()
        if self.fault:
            return False
        self._average.restart()
        self.trainer.refine()
        return True

    def _lesson_ends(self) -> None:
        """Learned or not, the next one is another: the same again would fail again."""
        self._lesson = None
        self._lessons_due = [] if self.replay.evicted else self._lessons_due[1:]
        if not self._lessons_due:
            self.teacher = None  # on a GPU it holds a copy of the target's embedding and lm_head

    def _train(self) -> None:
        chosen = self.replay.sample(self._config.batch_tokens)
        skipped, empty = self.trainer.skipped, self.trainer.empty
        try:
            output = self.trainer.step(collate(chosen, self._head.device))
        except (RuntimeError, ValueError, IndexError) as error:
            self._drop(chosen, f"{type(error).__name__} in a training step")
            return
        if self.trainer.skipped > skipped:
            self._drop(chosen, "a training step was not finite")
            return
        rows = sum(len(one.token_ids) for one in chosen)
        self.tokens_trained += rows
        self._owed -= rows
        if self.trainer.empty > empty:  # not a row to learn from: the weights are what they were
            return
        self._average.update()
        self.loss = float(output.total)

    def _drop(self, chosen: list[Trajectory], why: str) -> None:
        """What breaks a step must not come again and again."""
        with self._forgetting():
            self.replay.remove(chosen)
        self.dropped += len(chosen)
        self.fault = f"{why}; its {len(chosen)} trajectories were dropped"
