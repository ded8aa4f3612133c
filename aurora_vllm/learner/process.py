"""The learner process: ``python -m aurora_vllm.learner.process``, started and supervised by the server.

A turn takes what the ring holds, then does one piece of work: score a trajectory, or train a step. What is scored is
scored before anything trains on it; where traffic comes faster than that, the oldest goes into training unscored and is
no evidence. The learner stays within its share of a CPU, and it may die at any moment: the server goes on, and the next
learner begins with the version that was published last, and with what was saved of its training.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any

import torch
from safetensors import SafetensorError

from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.budget import CpuBudget
from aurora_vllm.learner.draft import load_config, load_draft
from aurora_vllm.learner.evaluate import Recent, simulate
from aurora_vllm.learner.publish import Evidence, Sync, publish
from aurora_vllm.learner.remap import move_to_vocabulary
from aurora_vllm.learner.replay import Replay
from aurora_vllm.learner.resume import checkpoints_of, go_on, state_of
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Assembler, Trajectory
from aurora_vllm.learner.vocabulary import Coverage, Reselection
from aurora_vllm.session import CHECKPOINT_VERSION, Session
from aurora_vllm.transport.bank import TornPublish, WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingConsumer
from aurora_vllm.transport.segment import Segment

READ_ROWS = 1024
IDLE_S = 0.05
SCORE_BACKLOG = 16  # unscored trajectories beyond this are trained on unscored: the oldest, which say least about now


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
            self.candidate, self.head, config.learning_rate, config.ttt_length, prompt_weight=config.prompt_weight
        )
        self.evidence = Evidence(
            config.evidence_tokens, config.publish_margin, config.publish_interval_s, config.num_speculative_tokens
        )
        self.sync = Sync(config.sync, config.sync_interval)
        self.shadow = Recent(config.num_speculative_tokens)
        self.coverage = Coverage(self.incumbent.config.vocab_size)
        self.reselection = Reselection(session.target, config.vocabulary_coverage)
        self.budget = CpuBudget(config.learner_cpu_share)
        self.unscored: deque[Trajectory] = deque()
        self.trained_since_publish = False
        self.tokens_seen = self.tokens_trained = self.requests_seen = self.unusable = 0
        # In the dtype that is served, so that what is saved is what runs.
        self.draft_config = load_config(session.draft) | {"torch_dtype": session.dtype}
        self.checkpoints = checkpoints_of(session)
        self.carried: dict[str, Any] = {}  # counters of the learner this one goes on from
        self.control.learner.checkpoint = go_on(self, session)
        self.sync.published(self.trainer.steps, 0)
        self.saved, self.saved_at = (self.version, self.trainer.steps), time.monotonic()
        self._show_shadow()

    def turn(self) -> bool:
        """One piece of work. Returns whether there was any."""
        self.control.learner.beat()
        for trajectory in self.assembler.feed(self.ring.read(READ_ROWS)):
            self._arrived(trajectory)
        if self.unscored:
            self._say("evaluating")
            self._score(self.unscored.popleft())
            self._maybe_publish()
        elif self.tokens_trained < self.tokens_seen * self.config.replay_passes and len(self.replay):
            self._say("training")
            self._train()
            if self.config.sync != "evidence":
                self._maybe_publish()
        else:
            self._say("waiting for traffic")
            return False
        return True

    def _arrived(self, trajectory: Trajectory) -> None:
        block = self.control.learner
        block.trajectories += 1
        self._show_discarded()
        self.unscored.append(trajectory)
        if len(self.unscored) > SCORE_BACKLOG:
            self._remember(self.unscored.popleft())

    def _score(self, trajectory: Trajectory) -> None:
        """Both drafts on a trajectory that neither has trained on; then it may be trained on."""
        length = self.config.num_speculative_tokens
        incumbent = simulate(self.incumbent, self.head, trajectory, length)
        candidate = simulate(self.candidate, self.head, trajectory, length) if self.trained_since_publish else incumbent
        self.evidence.add(candidate, incumbent)
        self.shadow.add(incumbent)
        self._show_shadow()
        self._remember(trajectory)

    def _remember(self, trajectory: Trajectory) -> None:
        self.replay.add(trajectory)
        end = trajectory.start + len(trajectory.token_ids)
        self.requests_seen += trajectory.start < trajectory.prompt_length <= end  # of a cut one, one piece counts
        self.tokens_seen += len(trajectory.token_ids)
        self.coverage.observe(trajectory.token_ids[max(0, trajectory.prompt_length - trajectory.start) :])
        self._follow_vocabulary()
        block = self.control.learner
        block.vocabulary_coverage = self.coverage.share(self.incumbent.target_ids)
        block.tokens_seen = self.tokens_seen
        block.replay_bytes, block.replay_tokens = self.replay.nbytes, self.replay.tokens

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
        reason = self.sync.reason(verdict, self.trainer.steps, self.requests_seen)
        if not (reason and self.trained_since_publish):
            return
        version = max(self.version, self.bank.published(), self.control.worker.live_version) + 1
        try:
            publish(self.bank, version, self.candidate, {"reason": reason, "step": self.trainer.steps})
        except ValueError as error:  # weights that are not finite: back to the last good ones
            block.message = f"not published: {error}"
            self.candidate.load_state_dict(self.incumbent.state_dict())
            self.trainer.optimizer.state.clear()  # its moments are of the same kind, and of another vocabulary maybe
            self.trained_since_publish = False
            return
        self.version = version
        self.incumbent.load_state_dict(self.candidate.state_dict())
        self.sync.published(self.trainer.steps, self.requests_seen)
        self.shadow = Recent(self.config.num_speculative_tokens)
        self.shadow.add(self.evidence.published(time.monotonic()))
        self.trained_since_publish = False
        block.published_version = version
        block.publishes += 1
        self._show_shadow()

    def save(self, at_once: bool = False) -> None:
        """Write a checkpoint where one is wanted, due (or ``at_once``), and something was learned since the last."""
        now, state = time.monotonic(), (self.version, self.trainer.steps)
        due = at_once or now - self.saved_at >= self.config.checkpoint_interval_s
        if self.checkpoints is None or not due or state == self.saved:
            return
        self._say("saving a checkpoint")
        block = self.control.learner
        self.saved_at = now
        try:
            path = self.checkpoints.save(self.incumbent, self.draft_config, *state_of(self))
        except (OSError, SafetensorError) as error:  # no room, most likely; learning goes on
            block.checkpoint = f"not saved: {error}"
            return
        self.saved = state
        block.checkpoint, block.checkpoints = path.name, block.checkpoints + 1

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
            self.incumbent.load_state_dict(self.bank.read(version).tensors)
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
        learner.save()
        stop.wait(learner.budget.debt() if worked else IDLE_S)
    learner.save(at_once=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
