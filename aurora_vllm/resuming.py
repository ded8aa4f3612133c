"""``--aurora-resume``: which checkpoint a server goes on from, and whether it fits the target."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

from aurora_vllm import checkpoint
from aurora_vllm.checkpoint import Draft, Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError, DamagedFile, notice
from aurora_vllm.learner import checkpoints
from aurora_vllm.learner.target import weights_fingerprint


def resumed_draft(config: AuroraConfig, target: Target) -> Draft | None:
    """The checked draft of the checkpoint that ``--aurora-resume`` names; None without the flag, and where "latest"
    finds none. "latest" passes over damaged checkpoints.

    Raises:
        AuroraError: there is no such checkpoint, or its draft does not fit the target.
    """
    if config.resume is None:
        return None
    for found in checkpoints.find(config.resume, config.checkpoint_dir):
        try:
            checkpoints.Checkpoint.read(found)
            checkpoint.read_shapes(found / checkpoints.LEARNER)
            return replace(checkpoint.read_draft(found, target), origin="resumed")
        except DamagedFile as error:
            if config.resume != Path(checkpoints.LATEST):
                raise
            # "latest" is meant to be given at every start, and a damaged checkpoint should not prevent one.
            notice(f"{error.what}; it is passed over", "WARNING")
    notice(f"no checkpoint in {config.checkpoint_dir} to go on from: learning begins from the start")
    return None


def check_same_target(draft: Draft, target: Target) -> None:
    """See that a checkpoint was trained for exactly this target's weights.

    Raises:
        AuroraError: it was trained for others. (--aurora-draft takes its draft all the same: it checks shapes only.)
    """
    trained_for = checkpoints.Checkpoint.read(draft.directory).facts["provenance"].get("target") or {}
    if trained_for.get("fingerprint") != weights_fingerprint(target.directory):
        raise AuroraError(
            f"checkpoint {draft.directory} was trained for {trained_for.get('model', 'another target')}, not for the "
            f"weights of {target.model}",
            "give it as --aurora-draft to start from its draft alone",
        )


def check_checkpoint_dir(config: AuroraConfig) -> None:
    """Make the directory for checkpoints.

    Raises:
        AuroraError: it cannot be made or written to.
    """
    if config.checkpoint_dir is None:
        return
    try:
        config.checkpoint_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(config.checkpoint_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise AuroraError(
            f"cannot write checkpoints to {config.checkpoint_dir}: {error.strerror}",
            "choose another --aurora-checkpoint-dir",
        ) from None
