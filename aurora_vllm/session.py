"""Session: what the three processes must agree on, carried in one environment variable.

The entrypoint writes it before vLLM spawns anything; worker, scheduler and learner read it. Shared-memory names are
random and stay out of vLLM's own configuration, because whatever lies there is hashed into its compile cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from aurora_vllm.config import AuroraConfig
from aurora_vllm.transport.rows import RowLayout

ENVIRONMENT_KEY = "AURORA_SESSION"
PLAIN_KEY = "AURORA_SERVED_PLAIN"  # in its place: why the entrypoint serves vLLM plain
CHECKPOINT_VERSION = 1  # of the draft weights vLLM loads from disk; the learner publishes 2, 3, ...


class Session(BaseModel):
    """One run of the server."""

    model_config = ConfigDict(frozen=True)

    config: AuroraConfig
    target: Path  # directory of the target checkpoint (safetensors)
    draft: Path  # directory of the EAGLE-3 checkpoint vLLM loads: version 1
    hidden_size: int  # of the target
    num_aux: int
    dtype: str  # the target's dtype as vLLM runs it, "float32", "bfloat16"
    ring: str  # names of the shared-memory segments
    bank: str
    control: str
    on_device: bool = False  # ring, bank and learner go on the target's GPU
    learner_gpu_bytes: int = 0  # planned for the learner's tensors there; 0: not bounded
    resume: Path | None = None  # the checkpoint that `draft` is, where the learner goes on from one
    model: str = ""  # the target as the user named it
    command: tuple[str, ...] = ()  # that started the server, secrets blanked
    vllm_version: str = ""

    @property
    def row_layout(self) -> RowLayout:
        return RowLayout(self.hidden_size, self.num_aux, getattr(torch, self.dtype))

    def export(self) -> None:
        """Put the session where child processes find it."""
        os.environ[ENVIRONMENT_KEY] = self.model_dump_json()

    @classmethod
    def from_environment(cls) -> Session | None:
        """The session of this run, or None where the process was not started by the entrypoint."""
        text = os.environ.get(ENVIRONMENT_KEY)
        return cls.model_validate_json(text) if text else None


def export_plain(reason: str) -> None:
    """Tell child processes that there is no session, and why: vLLM is served plain."""
    os.environ.pop(ENVIRONMENT_KEY, None)
    os.environ[PLAIN_KEY] = reason


def why_plain() -> str:
    """The reason given to :func:`export_plain`; "" where it was not called."""
    return os.environ.get(PLAIN_KEY, "")
