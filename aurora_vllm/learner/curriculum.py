"""How the draft is trained: a vocabulary that fits the traffic, closed-form lessons, gradient steps.

One piece of work at a time, so that the learner can read the ring and keep to its share of the CPU in between. This is
also what ``benchmarks.learning`` measures, without a server.
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

# A lesson after each of these numbers of rows: each is better than the one before, and the early ones are cheap.
# Measured by hand, SmolLM2-135M and GSM8K: twelve requests in a row had a mean acceptance length of 1.5 after 3,547
# tokens (two seeds); after 4,399 without the lesson at 2,048 (two seeds), after 5,204 with the first one at 3,072 (one
# seed).
LESSON_ROWS = (1024, 2048, 4096, 16_384)
LESSON_REQUESTS = 6
LARGEST_LESSON_ROWS = 16_384  # the newest ones; the cost of a lesson is proportional to them

Work = Literal["", "first lesson", "lesson", "training"]
_OVER = object()  # marks the end of a generator


class Curriculum:
    """Trains ``candidate``, which holds the average of the draft in training (averaging.py).

    Args:
        candidate: a day-0 draft, a given one, or one of an earlier run.
        head: the target's embedding and lm_head.
        config: settings.
        target: directory of the target, for the order of tokens in its tokenizer.
        worth_keeping: whether the draft was trained before, so that it is refined from the first step on.

    Attributes:
        tokens_seen, tokens_trained: rows of trajectories.
        vocabulary_changes: how often the vocabulary was chosen anew.
        dropped: trajectories dropped because a training step with them failed.
        fault: why the newest piece of work failed; empty if it did not.
        loss: of the newest training step.
        teacher: gives the remaining lessons, if any.
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
        self._owed = 0.0  # rows still to be trained on, summed over passes
        self.fault = ""
        self.loss = 0.0

    @property
    def awaits_first_lesson(self) -> bool:
        """Whether gradient steps wait for the first lesson."""
        return len(self._lessons_due) == len(LESSON_ROWS)

    @property
    def has_lessons_to_learn(self) -> bool:
        """Whether a lesson is to come or under way."""
        return bool(self._lessons_due) or self._lesson is not None

    def refine(self) -> None:
        """The candidate now is a trained draft: no lessons, and gentle steps from here."""
        self.skip_lessons()
        self._average.restart()
        self.trainer.refine()

    def go_on(self) -> None:
        """The candidate's weights were replaced: train on from these. The optimizer's state stays."""
        self._average.restart()
        if self.teacher is not None:
            self.teacher.start_over()

    def skip_lessons(self) -> None:
        """Go on with gradient steps only; a lesson under way is abandoned."""
        self._lessons_due, self._lesson, self.teacher = [], None, None

    def add(self, trajectory: Trajectory, owed: bool = True) -> bool:
        """Add a trajectory to learn from. Returns whether the candidate got another vocabulary.

        Args:
            owed: whether it is due for training.
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
        """Make about `tokens` of the newest rows, which arrived during sleep, due for training after all."""
        self._owed += self.replay.make_due(tokens, self._config.replay_passes)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """A context for removing trajectories from the replay: their remaining passes are no longer owed.

        Other trajectories may have been drawn in their place, so the debt is kept from becoming negative.
        """
        missed = self.replay.missed
        yield
        if self._owed > 0:
            self._owed = max(0.0, self._owed - (self.replay.missed - missed))

    def next(self) -> Work:
        """The next piece of work; empty if there is none."""
        if self._lesson is not None or self._lesson_is_due():
            return "first lesson" if self.awaits_first_lesson else "lesson"
        if self.awaits_first_lesson or not len(self.replay):
            return ""
        return "training" if self._owed > 0 else ""

    @property
    def works_on_host(self) -> bool:
        """Whether that piece is part of a lesson for a draft on a GPU, which is computed on the host."""
        return isinstance(self.teacher, HostLesson) and self.next() not in ("", "training")

    def work(self) -> bool:
        """Do that piece. Returns whether a lesson replaced the candidate's weights, so that older scores do not
        apply."""
        what, self.fault = self.next(), ""
        if what == "training":
            self._train()
        elif what:
            return self._study()
        return False

    def _lesson_is_due(self) -> bool:
        if not self._lessons_due or not len(self.replay):
            return False
        if self.replay.evicted:  # the replay is full, so waiting gains nothing
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
        """Whether it succeeded or not, go on to the next lesson: the same one would fail again."""
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
        if self.trainer.empty > empty:  # there was no row to learn from, and the weights did not change
            return
        self._average.update()
        self.loss = float(output.total)

    def _drop(self, chosen: list[Trajectory], why: str) -> None:
        """Drop trajectories with which a step failed, so that they do not come again."""
        with self._forgetting():
            self.replay.remove(chosen)
        self.dropped += len(chosen)
        self.fault = f"{why}; its {len(chosen)} trajectories were dropped"
