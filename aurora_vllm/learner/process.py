"""The learner process: ``python -m aurora_vllm.learner.process``, started and supervised by the server.

A turn takes what the ring holds, then does one piece of work: score a trajectory, give a day-0 draft its first lesson,
or train a step. What is scored is scored before anything trains on it; where traffic comes faster than that, the oldest
goes into training unscored and is no evidence. The learner stays within its share of a CPU, and it may die at any
moment: the server goes on, and the next learner begins with the version that was published last.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner import lesson
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.budget import CpuBudget
from aurora_vllm.learner.draft import load_draft, load_tensors
from aurora_vllm.learner.evaluate import Recent, Score, simulate
from aurora_vllm.learner.from_disk import publish_from_disk
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.publish import Evidence, publish
from aurora_vllm.learner.remap import move_to_vocabulary
from aurora_vllm.learner.replay import Replay
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Assembler, Trajectory
from aurora_vllm.learner.vocabulary import Coverage, Reselection
from aurora_vllm.session import CHECKPOINT_VERSION, Session
from aurora_vllm.transport import update_request
from aurora_vllm.transport.bank import TornPublish, WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.segment import Segment
from aurora_vllm.transport.update_request import Answer

READ_ROWS = 1024
IDLE_S = 0.05
SCORE_BACKLOG = 8  # unscored trajectories beyond this are trained on unscored: the oldest, which say least about now
SCORE_SHARE = 0.25  # of the learner's CPU time goes into scoring, where there is something else to do
LESSON_ROWS = 8192  # the first lesson waits for this many, of this many requests
LESSON_REQUESTS = 24


class Learner:
    """All state of the process."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.config = config
        self.control = ControlBlock.attach(Segment.attach(session.control))
        self.ring = RingConsumer.attach(Segment.attach(session.ring))
        self.bank = WeightBank.attach(Segment.attach(session.bank))
        self.assembler = Assembler(session.row_layout, max_tokens=config.max_trajectory_tokens)
        self.replay = Replay(config.replay_mb << 20, seed=config.seed)
        self.head = load_target_head(session.target)
        self.incumbent = load_draft(session.draft)
        self.version = self._take_published()
        self.candidate = copy.deepcopy(self.incumbent)
        self.trainer = Trainer(
            self.candidate,
            self.head,
            config.learning_rate,
            config.ttt_length,
            semantics=config.semantics,
            prompt_weight=config.prompt_weight if config.semantics == "default" else 0.0,
            objective=Objective(config.objective, config.discard_weight, config.discard_top_k),
        )
        self.evidence = Evidence(
            config.evidence_tokens, config.publish_margin, config.publish_interval_s, config.num_speculative_tokens
        )
        self.shadow = Recent(config.num_speculative_tokens)
        self.coverage = Coverage(self.incumbent.config.vocab_size)
        self.reselection = Reselection(session.target, config.vocabulary_coverage)
        self.budget = CpuBudget(config.learner_cpu_share)
        self.unscored: deque[Trajectory] = deque()
        self.awaits_lesson = lesson.is_due(self.candidate)
        self.lesson: Iterator[None] | None = None
        if config.draft is not None or self.version != CHECKPOINT_VERSION:
            self.trainer.refine()
        self.score_seconds = 0.0
        self.trained_since_publish = False
        self.tokens_seen = self.tokens_trained = self.unusable = 0
        update_request.refuse_open(self.control)

    def turn(self) -> bool:
        """One piece of work. Returns whether there was any."""
        self.control.learner.beat()
        if request := update_request.open_request(self.control):
            self._say("updating from disk")
            update_request.answer(self.control, request, self._update(Path(request.directory)))
        for trajectory in self.assembler.feed(self.ring.read(READ_ROWS)):
            self._arrived(trajectory)
        can_study, can_train = self._can_study(), self._can_train()
        may_score = self.score_seconds <= SCORE_SHARE * time.process_time() or not (can_study or can_train)
        if self.unscored and may_score:
            self._say("evaluating")
            self._score(self.unscored.popleft())
            self._maybe_publish()
        elif can_study:
            self._say("first lesson")
            self._study()
        elif can_train:
            self._say("training")
            self._train()
        else:
            self._say("collecting for the first lesson" if self.awaits_lesson else "waiting for traffic")
            return False
        return True

    def _can_study(self) -> bool:
        enough = self.replay.tokens >= LESSON_ROWS and len(self.replay) >= LESSON_REQUESTS
        return self.lesson is not None or (self.awaits_lesson and enough)

    def _can_train(self) -> bool:
        wanted = self.tokens_trained < self.tokens_seen * self.config.replay_passes
        return wanted and len(self.replay) > 0 and not self.awaits_lesson

    def _study(self) -> None:
        """One piece of the first lesson; the candidate knows it after the last."""
        if self.lesson is None:
            self.lesson = lesson.Lesson(self.candidate, self.head).run(self.replay.newest(4 * LESSON_ROWS))
        if next(self.lesson, self) is not self:
            return
        self.lesson, self.awaits_lesson = None, False
        self.trainer.refine()
        self.evidence.restart()
        self.trained_since_publish = True

    def _arrived(self, trajectory: Trajectory) -> None:
        block = self.control.learner
        block.trajectories += 1
        self._show_discarded()
        self.unscored.append(trajectory)
        if len(self.unscored) > SCORE_BACKLOG:
            self._remember(self.unscored.popleft())

    def _score(self, trajectory: Trajectory) -> None:
        """Both drafts on a trajectory that neither has trained on; then it may be trained on."""
        began = time.process_time()
        length = self.config.num_speculative_tokens
        incumbent = simulate(self.incumbent, self.head, trajectory, length)
        candidate = simulate(self.candidate, self.head, trajectory, length) if self.trained_since_publish else incumbent
        self.evidence.add(candidate, incumbent)
        self.shadow.add(incumbent)
        self.score_seconds += time.process_time() - began
        self._show_shadow()
        self._remember(trajectory)

    def _remember(self, trajectory: Trajectory) -> None:
        self.replay.add(trajectory)
        self.tokens_seen += len(trajectory.token_ids)
        self.coverage.observe(trajectory.token_ids[max(0, trajectory.prompt_length - trajectory.start) :])
        self._follow_vocabulary()
        block = self.control.learner
        block.vocabulary_coverage = self.coverage.share(self.incumbent.target_ids)
        block.tokens_seen = self.tokens_seen
        block.replay_bytes, block.replay_tokens = self.replay.nbytes, self.replay.tokens
        block.replay_trajectories = len(self.replay)

    def _follow_vocabulary(self) -> None:
        """Give the candidate another vocabulary where its own no longer fits the traffic; evidence decides as ever."""
        chosen = self.reselection.propose(self.coverage, self.candidate.target_ids)
        if chosen is None:
            return
        move_to_vocabulary(self.candidate, self.head, chosen, self.trainer.optimizer)
        self.evidence.restart()
        self.trained_since_publish = True  # it differs from the incumbent, and is to be scored
        self.control.learner.vocabulary_changes += 1

    def _train(self) -> None:
        chosen = self.replay.sample(self.config.batch_tokens)
        skipped = self.trainer.skipped
        try:
            output = self.trainer.step(collate(chosen))
        except (RuntimeError, ValueError, IndexError) as error:
            self._drop(chosen, f"{type(error).__name__} in a training step")
            return
        if self.trainer.skipped > skipped:
            self._drop(chosen, "a training step was not finite")
            return
        self.trained_since_publish = True
        self.tokens_trained += sum(len(one.token_ids) for one in chosen)
        block = self.control.learner
        block.step, block.tokens_trained, block.loss = self.trainer.steps, self.tokens_trained, float(output.total)

    def _drop(self, chosen: list[Trajectory], why: str) -> None:
        """What breaks a step must not come again and again."""
        self.replay.remove(chosen)
        self.unusable += len(chosen)
        self._show_discarded()
        self.control.learner.message = f"{why}; its {len(chosen)} trajectories were dropped"

    def _show_discarded(self) -> None:
        self.control.learner.trajectories_discarded = sum(self.assembler.discarded.values()) + self.unusable

    def _maybe_publish(self) -> None:
        verdict = self.evidence.verdict(time.monotonic())
        block = self.control.learner
        block.candidate_acceptance_length = verdict.candidate
        block.incumbent_acceptance_length = verdict.incumbent
        block.message = verdict.reason
        if not (verdict.publish and self.trained_since_publish):
            return
        version = self._next_version()
        try:
            publish(self.bank, version, self.candidate, {"reason": verdict.reason, "step": self.trainer.steps})
        except ValueError as error:  # weights that are not finite: back to the last good ones
            block.message = f"not published: {error}"
            move_to_vocabulary(self.candidate, self.head, self.incumbent.target_ids, self.trainer.optimizer)
            self.candidate.load_state_dict(self.incumbent.state_dict())
            return
        self.incumbent.load_state_dict(self.candidate.state_dict())
        self._published(version, self.evidence.published(time.monotonic()))

    def _update(self, directory: Path) -> Answer:
        """A draft somebody wants, in place of incumbent and candidate. Learning goes on from it."""
        version = self._next_version()
        try:
            draft = publish_from_disk(self.bank, version, directory, self.incumbent, lambda: self.head.embed_tokens)
        except AuroraError as error:
            return Answer(0, str(error))
        self.incumbent.load_state_dict(draft.state_dict())
        self.candidate.load_state_dict(draft.state_dict())
        self.lesson, self.awaits_lesson = None, lesson.is_due(self.candidate)  # one under way was for another draft
        self.trainer.refine()
        self.evidence.restart()  # it speaks of other drafts
        self._published(version, None)
        return Answer(version, f"published as version {version}")

    def _published(self, version: int, score: Score | None) -> None:
        """The incumbent is this version now. score: on what carried it, where there is any."""
        self.version = version
        self.shadow = Recent(self.config.num_speculative_tokens)
        if score is not None:
            self.shadow.add(score)
        self.trained_since_publish = False
        block = self.control.learner
        block.published_version = version
        block.publishes += 1
        self._show_shadow()

    def _next_version(self) -> int:
        return max(self.version, self.bank.published(), self.control.worker.live_version) + 1

    def _show_shadow(self) -> None:
        block = self.control.learner
        block.shadow_version, block.shadow_steps = self.version, round(self.shadow.steps)
        block.shadow_accepted_per_position = self.shadow.per_position()

    def _take_published(self) -> int:
        """Continue from the bank where it holds a version; the version the incumbent is."""
        version = self.bank.published()
        if version == 0:
            return CHECKPOINT_VERSION
        try:
            load_tensors(self.incumbent, {name: t.clone() for name, t in self.bank.read(version).tensors.items()})
        except TornPublish:
            return CHECKPOINT_VERSION
        return version

    def _say(self, state: str) -> None:
        block = self.control.learner
        if block.state != state:
            block.state = state
        block.cpu_seconds = time.process_time()


def main() -> int:
    """Learn until told to stop."""
    session = Session.from_environment()
    if session is None:
        print(
            "aurora_vllm: error: the learner is started by the server; run python -m aurora_vllm.entrypoint",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(session.config.learner_threads)
    torch.manual_seed(session.config.seed)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    learner = Learner(session)
    learner.control.learner.pid = os.getpid()
    while not stop.is_set():
        worked = learner.turn()
        stop.wait(learner.budget.debt() if worked else IDLE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
