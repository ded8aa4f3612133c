"""What of a learner outlives it: written into a checkpoint, and taken up again from one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from aurora_vllm.errors import AuroraError, notice
from aurora_vllm.learner.checkpoints import Checkpoint, Checkpoints
from aurora_vllm.learner.draft import load_config
from aurora_vllm.learner.evaluate import Recent
from aurora_vllm.provenance import provenance
from aurora_vllm.session import CHECKPOINT_VERSION, Session

if TYPE_CHECKING:
    from aurora_vllm.learner.learner import Learner

CANDIDATE, OPTIMIZER, COUNTS = "candidate.", "optimizer.", "emitted_counts"


class Keeper:
    """Saves what a learner has learned, and gives a new learner what another one saved.

    Args:
        learner: the learner, its version and draft known; what was saved of them is put into it.
        session: of this run.
    """

    def __init__(self, learner: Learner, session: Session) -> None:
        self._learner = learner
        directory = session.config.checkpoint_dir
        # The control block's name is random: no other run has it, and a learner started again finds its predecessor
        # by it.
        self._checkpoints = (
            Checkpoints(directory, session.control, provenance(session), session.resume) if directory else None
        )
        # In the dtype that is served, so that what is saved is what runs.
        self._draft_config = load_config(session.draft) | {"torch_dtype": session.dtype}
        self._failing = False
        self._carried: dict[str, Any] = {}  # counters of the learner this one goes on from
        learner.control.learner.checkpoint = self._go_on(session)
        self._saved, self._saved_at = self._state(), time.monotonic()

    def save(self, at_once: bool = False) -> None:
        """Write a checkpoint where one is wanted, due (or ``at_once``), and something was learned since the last."""
        now, state = time.monotonic(), self._state()
        due = at_once or now - self._saved_at >= self._learner.config.checkpoint_interval_s
        if self._checkpoints is None or not due or state == self._saved:
            return
        block = self._learner.control.learner
        block.state = "saving a checkpoint"
        self._saved_at = now
        try:
            path = self._checkpoints.save(
                self._learner.drafts.incumbent, self._draft_config, *state_of(self._learner, self._carried)
            )
        except (OSError, SafetensorError, RuntimeError) as error:  # no room, most likely, or a GPU's; learning goes on
            block.checkpoint = f"not saved: {error}"
            block.checkpoint_failures += 1
            if not self._failing:  # once, and not every five minutes
                notice(f"no checkpoint could be saved ({error}); learning goes on, and it is tried again", "WARNING")
            self._failing = True
            return
        self._saved, self._failing = state, False
        block.checkpoint, block.checkpoints = path.name, block.checkpoints + 1

    def _state(self) -> tuple[int, int, int | None, bool]:
        learner, trainer = self._learner, self._learner.curriculum.trainer
        return learner.drafts.version, trainer.steps, trainer.refining_since, learner.drafts.candidate_is_ahead

    def _go_on(self, session: Session) -> str:
        """Take up what was saved of the version that is served. What was done, in words; empty where there is nothing.

        After a crash that is this run's own newest checkpoint, if nothing was published since it was saved; else the
        one the server was told to resume.
        """
        learner = self._learner
        try:
            saved = self._checkpoints.newest_of_run() if self._checkpoints else None
            if saved is not None:
                fits = saved.facts["statistics"]["version"] == learner.drafts.version
            elif session.resume is not None:
                saved, fits = Checkpoint.read(session.resume), learner.drafts.version == CHECKPOINT_VERSION
            if saved is None or not fits:
                return ""
            restore(learner, saved)
        except (AuroraError, ValueError, KeyError, TypeError) as error:
            anew = "training starts anew from the published draft"
            notice(f"what the learner had learned is lost ({error}); {anew}", "WARNING")
            return f"{anew}: {error}"
        self._carried = saved.facts["statistics"]
        return f"goes on from {saved.directory.name}, step {learner.curriculum.trainer.steps}"


def is_taught(resumed: Path | None) -> bool:
    """Whether a draft to go on from is worth keeping; one that was saved before its first lesson or step is not.

    What cannot be read may have learned anything.
    """
    if resumed is None:
        return False
    try:
        return _has_learned(Checkpoint.read(resumed).facts["statistics"])
    except (AuroraError, KeyError):
        return True


def _has_learned(statistics: Mapping[str, Any]) -> bool:
    return bool(statistics["steps"]) or statistics["refining_since"] is not None


def state_of(learner: Learner, carried: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and counters that :func:`restore` needs, as they are now. Trajectories and evidence stay behind: they
    are traffic. carried: counters of the learner this one went on from."""
    curriculum, drafts = learner.curriculum, learner.drafts
    tensors = {CANDIDATE + name: tensor for name, tensor in drafts.candidate.state_dict().items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in curriculum.trainer.state_tensors().items()}
    tensors[COUNTS] = curriculum.coverage.counts
    replay = curriculum.replay
    statistics = {
        "version": drafts.version,
        "steps": curriculum.trainer.steps,
        "refining_since": curriculum.trainer.refining_since,
        "tokens_seen": carried.get("tokens_seen", 0) + curriculum.tokens_seen,
        "tokens_trained": carried.get("tokens_trained", 0) + curriculum.tokens_trained,
        "candidate_is_ahead": drafts.candidate_is_ahead,
        "candidate_founds_lineage": drafts.candidate_founds_lineage,
        "shadow": {"steps": drafts.shadow.steps, "accepted": drafts.shadow.accepted},
        "replay": {
            "trajectories": len(replay),
            "tokens": replay.tokens,
            "bytes": replay.nbytes,
            "evicted": replay.evicted,
            "mean_uses": replay.mean_uses(),
        },
    }
    return tensors, statistics


def restore(learner: Learner, saved: Checkpoint) -> None:
    """Put a checkpoint's training state into a learner that already holds its published draft.

    Raises:
        AuroraError: the file is damaged.
        ValueError, KeyError: it does not fit this draft. The draft in training is as it was.
    """
    curriculum, drafts = learner.curriculum, learner.drafts
    tensors, statistics = saved.tensors(), saved.facts["statistics"]
    candidate, optimizer = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (CANDIDATE, OPTIMIZER)
    )
    own = {name: tensor.shape for name, tensor in drafts.candidate.state_dict().items()}
    if {name: tensor.shape for name, tensor in candidate.items()} != own:
        raise ValueError(f"{saved.directory} is of a draft of another shape")
    if tensors[COUNTS].shape != curriculum.coverage.counts.shape:
        raise ValueError(f"{saved.directory} counts another vocabulary")
    curriculum.trainer.load_state_tensors(optimizer, int(statistics["steps"]), statistics["refining_since"])
    if _has_learned(statistics):
        curriculum.skip_lessons()  # they begin from the day-0 draft, and would overwrite what came after it
    is_ahead, founds_lineage = statistics["candidate_is_ahead"], statistics.get("candidate_founds_lineage", False)
    drafts.resume_candidate(candidate, bool(is_ahead), bool(founds_lineage))
    curriculum.go_on()
    curriculum.coverage.counts.copy_(tensors[COUNTS])
    shadow = statistics["shadow"]
    if len(shadow["accepted"]) == drafts.shadow.length:
        drafts.shadow = Recent(drafts.shadow.length, steps=shadow["steps"], accepted=shadow["accepted"])
