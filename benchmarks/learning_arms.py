"""The learners that ``benchmarks.learning`` compares: the server's, Aurora's, and ours with one respect changed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.day0_layer import silent_branch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import TargetHead

RELEASE: dict[str, Any] = {
    "semantics": "aurora-release", "learning_rate": 1e-4, "replay_passes": 1.0, "ttt_length": 5,
    "vocabulary_coverage": 0.0, "prompt_weight": 0.0, "weight_average": 0.0,
}  # fmt: skip
RELEASE_BATCH = 8  # sequences per step


@dataclass(frozen=True)
class Arm:
    """One way to learn."""

    label: str
    settings: dict[str, Any] = field(default_factory=dict)  # over AuroraConfig's defaults
    random_start: bool = False
    silent_start: bool = False  # as where the target is quantized (day0_layer.py)
    lessons: bool = True
    induction: bool = True
    refining: bool = True
    batch_sequences: int = 0  # sequences per step; 0: as many as batch_tokens allows

    def curriculum(self, seed: int, longest: int, day0: Eagle3Draft, head: TargetHead, target: Path) -> Curriculum:
        """A learner of this arm, which trains a copy of the draft.

        Args:
            seed: of the learner, and of a random start.
            longest: rows of the longest trajectory.
            day0: the target's day-0 draft.
            head: the target's embedding and lm_head.
            target: directory of the target.
        """
        torch.manual_seed(seed)
        draft = copy.deepcopy(day0)
        if self.random_start:
            _forget(draft)
        if self.silent_start:
            _silence(draft)
        batch = self.settings.get("batch_tokens", AuroraConfig().batch_tokens)
        if self.batch_sequences:
            batch = self.batch_sequences * longest
        config = AuroraConfig(**(self.settings | {"seed": seed, "batch_tokens": batch}))
        curriculum = Curriculum(draft, head, config, target, worth_keeping=False)
        if not self.lessons:
            curriculum.skip_lessons()
        elif not self.induction:
            curriculum.teacher = Lesson(draft, head, induction=False)
        if not self.refining:
            curriculum.trainer.refine = curriculum.trainer.optimizer.state.clear  # type: ignore[method-assign]
        return curriculum


ARMS = {
    "ours": Arm("ours"),
    "release": Arm("Aurora's release", RELEASE, random_start=True, batch_sequences=RELEASE_BATCH),
    "no_lesson": Arm("without the lessons", lessons=False),
    "no_induction": Arm("lessons without induction heads", induction=False),
    "no_warm_start": Arm("without the warm start", random_start=True),
    "no_refining": Arm("lessons, then all at the full rate", refining=False),
    "no_average": Arm("without averaging weights", {"weight_average": 0.0}),
    "no_vocabulary": Arm("without choosing the vocabulary anew", {"vocabulary_coverage": 0.0}),
    "no_replay": Arm("every sample once", {"replay_passes": 1.0}),
    "half_replay": Arm("half the passes", {"replay_passes": 4.0}),
    "small_batch": Arm("a quarter of the batch", {"batch_tokens": 128}),
}
# Only by name: what the target's layer is worth as a start, which a quantized target cannot give.
SILENT = {
    "silent": Arm("without the target's layer", silent_start=True),
    "silent_no_lesson": Arm("without the target's layer and the lessons", silent_start=True, lessons=False),
}
# The paper's discard term, by its weight λ and by k: p is restricted to the target's k most probable tokens.
DISCARD = {
    f"discard_{weight:g}_{top_k}": Arm(
        f"discard term, λ={weight:g}, k={top_k}", {"discard_weight": weight, "discard_top_k": top_k}
    )
    for weight in (0.1, 1.0)
    for top_k in (3, 5, 8)
}
KNOWN = ARMS | SILENT | DISCARD


def arm_names(arms: str) -> list[str]:
    """Names separated by commas, "discard" standing for several; all of ARMS if there are none.

    Raises:
        typer.BadParameter: there is no such arm.
    """
    if not arms:
        return list(ARMS)
    names = [name.strip() for name in arms.split(",")]
    names += list(DISCARD) if "discard" in names else []
    unknown = sorted(set(names) - KNOWN.keys() - {"discard"})
    if unknown:
        raise typer.BadParameter(f"no arm {', '.join(unknown)}; known arms: {', '.join(KNOWN)}")
    return names


def _forget(draft: Eagle3Draft) -> None:
    """Initialise as Aurora's release does without a given draft: matrices normal with deviation 0.02, norms one."""
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


def _silence(draft: Eagle3Draft) -> None:
    """Replace the layer's projections by those of a quantized target's day-0 draft."""
    attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
    with torch.no_grad():
        for branch in (
            (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            (mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        ):
            for linear, weight in zip(branch, silent_branch([one.weight.shape for one in branch]), strict=True):
                linear.weight.copy_(weight)
