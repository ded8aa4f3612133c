"""The learner: the state of the process, and what it does in a turn.

A turn empties the ring, then does one piece of work: it scores a trajectory, or does what is next in the curriculum. A
trajectory is scored before anything is trained on it; if traffic comes faster, the oldest are trained on unscored and
give no evidence.

Drafts and batches are where ring and bank are: on the CPU, or on the target's GPU (transport/placement.py).
Trajectories and the replay are always on the host.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from aurora_vllm.errors import first_line, notice
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.budget import LONGEST_SLEEP_S, CpuBudget, DeviceClock
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.draft import Eagle3Draft, load_draft
from aurora_vllm.learner.draft_pair import DraftPair
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.evidence import Evidence, Sync
from aurora_vllm.learner.gpu_bound import bound_gpu_memory
from aurora_vllm.learner.publisher import Publisher
from aurora_vllm.learner.resume import Keeper, is_taught
from aurora_vllm.learner.sleep import Sleep
from aurora_vllm.learner.standing import follow_rollback, take_standing
from aurora_vllm.learner.target import lent_target_head, load_target_head
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.session import CHECKPOINT_VERSION, Session
from aurora_vllm.transport import update_request
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.placement import CPU, join
from aurora_vllm.transport.segment import Segment

READ_ROWS = 1024
GPU_LONGEST_SLEEP_S = 0.5  # a GPU fills the ring in seconds
SCORE_BACKLOG = 8  # with more unscored trajectories, the oldest are trained on unscored
# The largest share of the learner's CPU time for scoring while there is other work: with a candidate to judge, and
# without one, where scores only measure the draft in use.
JUDGING_SHARE, WATCHING_SHARE = 0.25, 0.05


class Learner:
    """The learner of one session.

    Args:
        session: of this run.

    Raises:
        AuroraError: the target's embedding and lm_head or the draft cannot be read, or the device's memory cannot be
            opened.
        FileNotFoundError, ValueError: the shared memory is gone, or was made by another version of this package.
    """

    def __init__(self, session: Session) -> None:
        config = session.config
        self.config, self.session = config, session
        self.control = ControlBlock.attach(Segment.attach(session.control))
        joined = join(Segment.attach(session.ring), Segment.attach(session.bank), self.control.worker)
        self.ring, self.bank, self.device = joined.ring, joined.bank, joined.device
        self.assembler = Assembler(
            session.row_layout, max_tokens=config.max_trajectory_tokens, branches=config.discard_weight > 0
        )
        incumbent = load_draft(session.draft)
        if joined.head is None:
            head = load_target_head(session.target)
        else:
            dtype, shape = getattr(torch, session.dtype), (incumbent.config.vocab_size, session.hidden_size)
            head = lent_target_head(session.target, joined.head.embedding, joined.head.lm_head, dtype, shape)
        not_lent = head.nbytes if joined.head is None else 0  # mostly not in the plan
        bound_gpu_memory(session.learner_gpu_bytes and session.learner_gpu_bytes + not_lent, self.device)
        self.head, incumbent = head.to(self.device), incumbent.to(self.device)
        version, lineage = take_standing(incumbent, self.bank, self.control.worker)
        self.drafts = DraftPair(incumbent, version, lineage, config.num_speculative_tokens)
        given = config.draft is not None or version != CHECKPOINT_VERSION or is_taught(session.resume)
        self.curriculum = Curriculum(self.drafts.candidate, self.head, config, session.target, worth_keeping=given)
        self.evidence = Evidence(
            config.evidence_tokens, config.publish_margin, config.publish_interval_s, config.num_speculative_tokens
        )
        self.sync = Sync(config.sync, config.sync_interval)
        self.gpu_time = DeviceClock(self.ring.memory.settle) if self.device != CPU else None
        self.budget = CpuBudget(
            config.learner_cpu_share,
            self.gpu_time or time.process_time,
            longest_sleep_s=GPU_LONGEST_SLEEP_S if self.gpu_time else LONGEST_SLEEP_S,
        )
        self.unscored: deque[Trajectory] = deque()
        self.score_seconds = 0.0
        self.requests_seen = 0
        self.keeper = Keeper(self, session)
        self.publisher = Publisher(self)
        self.sleep = Sleep(self)
        self.sync.published(self.curriculum.trainer.steps, 0)
        self.show_shadow()
        update_request.refuse_open(self.control)

    def turn(self, rests: bool = False) -> bool:
        """Respond to server and worker, empty the ring and, unless it rests, do one piece of work. Returns whether
        there was any."""
        self.control.learner.beat()
        follow_rollback(self)
        if request := update_request.open_request(self.control):
            self._say("updating from disk")
            update_request.answer(self.control, request, self.publisher.publish_from_disk(Path(request.directory)))
        with self._uncounted():  # this takes almost no GPU time
            self._take_rows()
        if rests:
            return False
        if self.sleep.asleep:
            self._say("sleeping")
            return self.sleep.turn()
        work = self.curriculum.next()
        # Before its first lesson a candidate differs at most in its vocabulary, and both drafts accept next to nothing.
        judges = self.drafts.candidate_is_ahead and not self.curriculum.awaits_first_lesson
        share = JUDGING_SHARE if judges else WATCHING_SHARE
        may_score = not work or self.score_seconds <= share * time.process_time()
        if self.unscored and may_score:
            self._say("evaluating")
            if self._score(self.unscored.popleft()):
                self.publisher.publish_if_due()
        elif work:
            self._say(work)
            self._work()
        else:
            waits = self.curriculum.awaits_first_lesson
            self._say("collecting for the first lesson" if waits else "waiting for traffic")
            return False
        return True

    def _take_rows(self) -> None:
        """Empty the ring: turns are far apart, and when the ring is full requests are lost."""
        for _ in range(0, self.ring.capacity, READ_ROWS):
            rows = self.ring.read(READ_ROWS)
            for trajectory in self.assembler.feed(rows.cpu()):
                self._arrived(trajectory)
            if len(rows) < READ_ROWS:
                break

    def _uncounted(self, when: bool = True) -> AbstractContextManager[None]:
        """A context for work without the GPU, where GPU time is what is counted."""
        return self.gpu_time.on_host() if self.gpu_time is not None and when else nullcontext()

    def _arrived(self, trajectory: Trajectory) -> None:
        self.control.learner.trajectories += 1
        self._show_discarded()
        self.unscored.append(trajectory)
        if len(self.unscored) > SCORE_BACKLOG:
            self.remember(self.unscored.popleft())

    def _score(self, trajectory: Trajectory) -> bool:
        """Score both drafts on a trajectory, then release it for training. Returns whether it is evidence."""
        drafts, began = self.drafts, time.process_time()
        incumbent = self.simulated(drafts.incumbent, trajectory)
        candidate = self.simulated(drafts.candidate, trajectory) if drafts.candidate_is_ahead else incumbent
        if is_evidence := incumbent is not None and candidate is not None:
            self.evidence.add(candidate, incumbent)
            self.sleep.scored(trajectory, candidate, incumbent)
            self.show_live(incumbent)
        self.score_seconds += time.process_time() - began
        self.remember(trajectory)
        return is_evidence

    def simulated(self, draft: Eagle3Draft, trajectory: Trajectory) -> Score | None:
        """A draft's score on a trajectory; None if memory does not suffice, which only costs evidence."""
        try:
            return simulate(draft, self.head, trajectory, self.config.num_speculative_tokens)
        except RuntimeError as error:
            why = f"{type(error).__name__} in scoring a request, which is no evidence: {first_line(error)}"
            if self.control.learner.message != why:
                notice(why)
            self.control.learner.message = why
            return None

    def show_live(self, score: Score) -> None:
        """Add to the incumbent's score, and show it to the serving side."""
        self.drafts.shadow.add(score)
        self.show_shadow()

    def remember(self, trajectory: Trajectory) -> None:
        """Release a trajectory for training."""
        end = trajectory.start + len(trajectory.token_ids)
        self.requests_seen += trajectory.start < trajectory.prompt_length <= end  # of a long request, one piece counts
        if self.curriculum.add(trajectory, owed=not self.sleep.asleep):
            self.drafts.candidate_changed()
            self.forget_scores("the draft vocabulary was chosen anew")
        block, curriculum = self.control.learner, self.curriculum
        if curriculum.fault:
            block.message = curriculum.fault
        block.vocabulary_coverage = curriculum.coverage.share(self.drafts.incumbent.target_ids)
        block.vocabulary_changes = curriculum.vocabulary_changes
        block.tokens_seen = curriculum.tokens_seen
        block.replay_bytes, block.replay_tokens = curriculum.replay.nbytes, curriculum.replay.tokens
        block.replay_trajectories = len(curriculum.replay)

    def _work(self) -> None:
        curriculum, block = self.curriculum, self.control.learner
        steps = curriculum.trainer.steps
        with self._uncounted(curriculum.works_on_host):
            is_another = curriculum.work()
        if is_another:
            self.drafts.candidate_changed(founds_lineage=True)
            self.forget_scores("a lesson was learnt")
        if curriculum.fault:
            block.message = curriculum.fault
            self._show_discarded()
        if curriculum.trainer.steps > steps:
            self.drafts.candidate_changed()
            block.step, block.tokens_trained = curriculum.trainer.steps, curriculum.tokens_trained
            block.steps_taken += curriculum.trainer.steps - steps
            block.loss = curriculum.loss
            if self.config.sync != "evidence":
                self.publisher.publish_if_due()

    def start_over_from(self, draft: Eagle3Draft, version: int, lineage: int, why: str) -> None:
        """Replace incumbent and candidate by a draft that does not come from this training; earlier scores are
        dropped."""
        self.drafts.replace(draft, version, lineage)
        self.curriculum.refine()
        self.forget_scores(why)
        self.show_shadow()

    def forget_scores(self, why: str) -> None:
        """The candidate was replaced, not just trained on: earlier scores do not apply to it."""
        self.evidence.restart()
        self.sleep.restart(why)

    def _show_discarded(self) -> None:
        discarded = sum(self.assembler.discarded.values()) + self.curriculum.dropped
        self.control.learner.trajectories_discarded = discarded

    def show_shadow(self) -> None:
        block, shadow = self.control.learner, self.drafts.shadow
        block.shadow_version, block.shadow_steps = self.drafts.version, round(shadow.steps)
        block.shadow_accepted_per_position = shadow.per_position()

    def _say(self, state: str) -> None:
        block = self.control.learner
        if block.state != state:
            block.state = state
        block.cpu_seconds = time.process_time()
