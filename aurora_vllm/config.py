"""AuroraConfig: every setting, once. Flags, environment and YAML are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

FLAG_PREFIX = "--aurora-"


class AuroraConfig(BaseModel):
    """All settings. Field names are the keys everywhere: ``ring_mb`` is ``--aurora-ring-mb``,
    ``AURORA_RING_MB`` and ``ring_mb:`` in a YAML file.

    They are sent between processes, so no validator looks at the machine's CPUs or memory; :mod:`.preflight` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # --- speculation ---
    draft: Path | None = Field(
        None, description="EAGLE-3 draft checkpoint; without one a day-0 draft is made from the target"
    )
    num_speculative_tokens: int = Field(3, ge=1, le=8, description="largest draft length K")
    speculate: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: only where it pays; always: fixed K; never: capture and learn only"
    )
    prompt_lookup: bool = Field(
        True,
        description="where a text repeats itself, propose what followed the last time, as long as that is right "
        "at least as often as the draft",
    )
    prompt_lookup_tokens: int = Field(
        8, ge=1, le=16, description="largest number of tokens proposed that way; at most 8 in vLLM's V2 runner"
    )
    prompt_lookup_answers: int = Field(
        65_536,
        ge=0,
        description="tokens of answers to other requests that may be copied, too; 0: only the request's own text",
    )
    rollback_confidence: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="confidence that a new version accepts over 15 % fewer draft tokens, at which it is rolled back; "
        "0: never",
    )
    draft_vocab_size: int | None = Field(
        None, ge=64, description="tokens a day-0 draft may propose; without it 8 x hidden size, at most 32768"
    )
    cache_dir: Path = Field(
        Path("~/.cache/aurora_vllm"),
        validate_default=True,
        description="where day-0 drafts are kept (weights only, never traffic)",
    )

    # --- capture ---
    sample_rate: float = Field(1.0, ge=0, le=1, description="share of requests that are captured for learning")
    ring_mb: int | None = Field(
        None,
        ge=1,
        description="trace ring size in MiB; without it 256, or on a GPU what two of vLLM's largest steps take",
    )

    # --- learning ---
    learn: bool = Field(True, description="run the learner")
    learner_device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: learn on the target's GPU where there is one (never run yet: docs/gpu.md)"
    )
    learner_cpu_share: float = Field(
        0.05, gt=0, le=1, description="largest share of one CPU (or of the GPU) the learner takes while serving"
    )
    learner_least_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="share while its draft (at first: speculation) saves no time; else at most a quarter of that time",
    )
    learner_resting_share: float = Field(
        0.002, gt=0, le=1, description="the same where even a good draft would save no time beside copies"
    )
    learner_slowdown: float = Field(
        0.0, ge=0, description="share of the time per output token that learning may add before it yields; 0: no bound"
    )
    learner_nice: int = Field(19, ge=0, le=19, description="nice value of the learner process")
    learner_threads: int = Field(1, ge=1, description="threads of the learner")
    learner_sleep: bool = Field(
        True, description="stop training when it no longer helps, until acceptance or vocabulary coverage drops"
    )
    replay_mb: int = Field(512, ge=1, description="byte budget of the replay buffer in MiB")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW learning rate")
    weight_average: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay per optimizer step of the weights' moving average, which is judged and served; 0: none",
    )
    batch_tokens: int = Field(512, ge=16, description="approximate number of positions in an optimizer step")
    prompt_weight: float = Field(0.0, ge=0, le=1, description="weight of prompt positions in the loss; answers have 1")
    replay_passes: float = Field(
        8.0, gt=0, description="times each position is trained on; then the learner waits for traffic"
    )
    semantics: Literal["default", "aurora-release"] = Field(
        "default", description="aurora-release: loss masks as in Aurora's release, quirks included, prompt_weight 0"
    )
    ttt_length: int = Field(3, ge=1, le=8, description="unroll steps of training-time test")
    objective: Literal["forward", "reverse", "reverse+next-token"] = Field(
        "forward", description="divergence from the target on accepted positions"
    )
    discard_weight: float = Field(
        0.0, ge=0, description="weight of the discard term (lambda), learned from rejected drafts; 0: off"
    )
    discard_top_k: int = Field(10, ge=0, description="tokens of the target in the discard term; 0: all")
    max_trajectory_tokens: int = Field(2048, ge=32, description="longer requests are cut into pieces of this length")
    vocabulary_coverage: float = Field(
        0.97, ge=0, le=1, description="share of the traffic below which the draft vocabulary is reselected; 0: never"
    )
    publish_margin: float = Field(0.02, ge=0, description="how much acceptance length a candidate must win by")
    publish_interval_s: float = Field(15.0, ge=0, description="shortest time between two publishes")
    evidence_tokens: int = Field(
        600, ge=1, description="response tokens a candidate is judged on before it may publish"
    )
    sync: Literal["evidence", "steps", "requests"] = Field(
        "evidence",
        description="when a version is published: on evidence that it is better; or, unjudged as in Aurora's release, "
        "every sync_interval optimizer steps or requests",
    )
    sync_interval: int = Field(50, ge=1, description="optimizer steps or requests between two publishes, see sync")

    # --- what is kept ---
    checkpoint_dir: Path | None = Field(
        None, description="where checkpoints are kept, one directory a server; without one none are written"
    )
    checkpoint_interval_s: float = Field(300.0, gt=0, description="time between two checkpoints; one more at the end")
    resume: Path | None = Field(
        None, description="checkpoint to go on from; latest: the newest in checkpoint_dir, if there is one"
    )

    # --- housekeeping ---
    sglang_api: bool = Field(False, description="also answer SGLang's and Aurora's endpoints")
    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed of learner and sampling of requests")

    @field_validator("discard_weight")
    @classmethod
    def _long_enough(cls, weight: float, others: ValidationInfo) -> float:
        if weight and others.data.get("ttt_length") == 1:
            raise ValueError("the discard term begins at the second unroll step: ttt_length must be at least 2")
        return weight

    @field_validator("draft", "cache_dir", "checkpoint_dir", "resume")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        # A shell expands ~ in a flag, but nobody does in a YAML file or in a container's environment.
        try:
            return path.expanduser() if path is not None else None
        except RuntimeError:  # no HOME, and a user id that has no name
            raise ValueError("there is no home directory") from None

    @field_validator("draft", "cache_dir", "checkpoint_dir", "resume", mode="before")
    @classmethod
    def _no_empty_path(cls, path: Any) -> Any:
        if path == "":  # it would be the current directory
            raise ValueError("the path is empty")
        return path


def flag_of(field: str) -> str:
    """The command-line option that sets one of AuroraConfig's fields."""
    return FLAG_PREFIX + field.replace("_", "-")
