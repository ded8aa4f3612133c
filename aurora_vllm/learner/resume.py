"""What of a learner outlives it: written into a checkpoint, and taken up again from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.checkpoints import Checkpoint, Checkpoints
from aurora_vllm.learner.evaluate import Recent
from aurora_vllm.provenance import provenance
from aurora_vllm.session import CHECKPOINT_VERSION, Session

if TYPE_CHECKING:
    from aurora_vllm.learner.process import Learner

CANDIDATE, OPTIMIZER, COUNTS = "candidate.", "optimizer.", "emitted_counts"


def checkpoints_of(session: Session) -> Checkpoints | None:
    """Where this run's learner saves; None where no checkpoints are wanted."""
    directory = session.config.checkpoint_dir
    # The control block's name is random: no other run has it, and a learner started again finds its predecessor by it.
    return Checkpoints(directory, session.control, provenance(session), session.resume) if directory else None


def state_of(learner: Learner) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and counters that :func:`restore` needs, as they are now. Trajectories and evidence stay behind: they
    are traffic."""
    tensors = {CANDIDATE + name: tensor for name, tensor in learner.candidate.state_dict().items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in learner.trainer.state_tensors().items()}
    tensors[COUNTS] = learner.coverage.counts
    replay, carried = learner.replay, learner.carried
    statistics = {
        "version": learner.version,
        "steps": learner.trainer.steps,
        "tokens_seen": carried.get("tokens_seen", 0) + learner.tokens_seen,
        "tokens_trained": carried.get("tokens_trained", 0) + learner.tokens_trained,
        "candidate_is_ahead": learner.trained_since_publish,
        "shadow": {"steps": learner.shadow.steps, "accepted": learner.shadow.accepted},
        "replay": {
            "trajectories": len(replay),
            "tokens": replay.tokens,
            "bytes": replay.nbytes,
            "evicted": replay.evicted,
            "mean_uses": replay.mean_uses(),
        },
    }
    return tensors, statistics


def go_on(learner: Learner, session: Session) -> str:
    """Take up what was saved of the version that is served. What was done, in words; empty where there is nothing.

    After a crash that is this run's own newest checkpoint, if nothing was published since it was saved; else the one
    the server was told to resume.
    """
    try:
        saved = learner.checkpoints.newest_of_run() if learner.checkpoints else None
        if saved is not None:
            fits = saved.facts["statistics"]["version"] == learner.version
        elif session.resume is not None:
            saved, fits = Checkpoint.read(session.resume), learner.version == CHECKPOINT_VERSION
        if saved is None or not fits:
            return ""
        restore(learner, saved)
    except (AuroraError, ValueError, KeyError) as error:
        return f"training starts anew from the published draft: {error}"
    return f"goes on from {saved.directory.name}, step {learner.trainer.steps}"


def restore(learner: Learner, saved: Checkpoint) -> None:
    """Put a checkpoint's training state into a learner that already holds its published draft.

    Raises:
        AuroraError: the file is damaged.
        ValueError, KeyError: it does not fit this draft. The draft in training is as it was.
    """
    tensors, statistics = saved.tensors(), saved.facts["statistics"]
    candidate, optimizer = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (CANDIDATE, OPTIMIZER)
    )
    own = {name: tensor.shape for name, tensor in learner.candidate.state_dict().items()}
    if {name: tensor.shape for name, tensor in candidate.items()} != own:
        raise ValueError(f"{saved.directory} is of a draft of another shape")
    if tensors[COUNTS].shape != learner.coverage.counts.shape:
        raise ValueError(f"{saved.directory} counts another vocabulary")
    learner.trainer.load_state_tensors(optimizer, int(statistics["steps"]))
    learner.candidate.load_state_dict(candidate)
    learner.coverage.counts.copy_(tensors[COUNTS])
    learner.trained_since_publish = bool(statistics["candidate_is_ahead"])
    learner.carried = statistics
    shadow = statistics["shadow"]
    if len(shadow["accepted"]) == learner.shadow.length:
        learner.shadow = Recent(learner.shadow.length, steps=shadow["steps"], accepted=shadow["accepted"])
