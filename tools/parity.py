"""Compares this learner's objective with recorded results of Aurora's release.

    python -m tools.parity CASE.json

A case is ``CASE.json`` (sizes, losses) with ``CASE.safetensors`` beside it: inputs ``in.*``, frozen
``target.lm_head``, weights ``draft.*`` and gradients ``grad.*`` under Hugging Face EAGLE-3 names. Prints the
differences as JSON. Exit code: 0 within tolerance, 1 above it, 2 if the case cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from aurora_vllm.errors import AuroraError, report
from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft, load_tensors
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.loss import ttt_loss
from aurora_vllm.learner.target import TargetHead

LOSS_TOLERANCE = 1e-4  # absolute: each step's loss and accuracy, and the total
GRADIENT_TOLERANCE = 1e-3  # relative, of each gradient tensor


@dataclass(frozen=True)
class Case:
    """A recorded case, loaded."""

    draft: Eagle3Draft
    head: TargetHead
    batch: Batch
    ttt_length: int
    step_loss: list[float]
    step_accuracy: list[float]
    total_loss: float
    gradients: dict[str, torch.Tensor]


def load_case(path: Path) -> Case:
    """Read a case.

    Raises:
        AuroraError: a file, key or tensor is missing or does not fit the others.
    """
    try:
        sizes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise AuroraError(f"cannot read the case {path}: {error}") from None
    if not isinstance(sizes, dict):
        raise AuroraError(f"the case {path} is not a JSON object")
    draft = Eagle3Draft(Eagle3Config.from_hf(sizes))
    weights = _part(tensors, "draft.")
    if "embed_tokens.weight" not in weights:
        raise AuroraError(f"the case {path} has no tensor draft.embed_tokens.weight")
    load_tensors(draft, weights)
    try:
        batch = _batch(tensors)
        case = Case(
            draft=draft,
            head=TargetHead(weights["embed_tokens.weight"], tensors["target.lm_head"].float()),
            batch=batch,
            ttt_length=int(sizes["ttt_length"]),
            step_loss=[float(x) for x in sizes["step_loss"]],
            step_accuracy=[float(x) for x in sizes["step_accuracy"]],
            total_loss=float(sizes["total_loss"]),
            gradients=_part(tensors, "grad."),
        )
    except KeyError as missing:
        raise AuroraError(f"the case {path} has no {missing}") from None
    except (TypeError, ValueError) as error:
        raise AuroraError(f"the case {path} holds a wrong value: {error}") from None
    _check(case, path)
    return case


def compare(case: Case) -> dict[str, Any]:
    """Run the objective with the release's semantics, and return the differences."""
    output = ttt_loss(case.draft, case.head, case.batch, case.ttt_length, semantics="aurora-release")
    output.total.backward()
    found = {name: parameter.grad for name, parameter in case.draft.named_parameters()}
    gradients = {name: _relative(found[name], wanted) for name, wanted in case.gradients.items()}
    steps = [
        {
            "loss": float(output.step_loss[i]),
            "loss_difference": abs(float(output.step_loss[i]) - case.step_loss[i]),
            "accuracy": float(output.step_accuracy[i]),
            "accuracy_difference": abs(float(output.step_accuracy[i]) - case.step_accuracy[i]),
        }
        for i in range(case.ttt_length)
    ]
    total_difference = abs(float(output.total.detach()) - case.total_loss)
    differences = [total_difference] + [s[k] for s in steps for k in ("loss_difference", "accuracy_difference")]
    within = [d <= LOSS_TOLERANCE for d in differences] + [g <= GRADIENT_TOLERANCE for g in gradients.values()]
    return {
        "steps": steps,
        "total_loss": float(output.total.detach()),
        "total_loss_difference": total_difference,
        "gradient_relative_difference": gradients,
        "loss_tolerance": LOSS_TOLERANCE,
        "gradient_tolerance": GRADIENT_TOLERANCE,
        "within_tolerance": all(within),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("case", type=Path, help="CASE.json, with CASE.safetensors beside it")
    try:
        result = compare(load_case(parser.parse_args(argv).case))
    except AuroraError as error:
        return report(error)
    print(json.dumps(result, indent=2))
    return 0 if result["within_tolerance"] else 1


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _batch(tensors: dict[str, torch.Tensor]) -> Batch:
    ids = tensors["in.input_ids"].long()
    return Batch(
        input_ids=ids,
        aux=tensors["in.aux_hidden_states"].float(),
        last=tensors["in.last_hidden_states"].float(),
        attention_mask=tensors["in.attention_mask"].bool(),
        loss_mask=tensors["in.loss_mask"].bool(),
        positions=torch.arange(ids.shape[-1]).expand(ids.shape),
    )


def _check(case: Case, path: Path) -> None:
    config, batch, ids = case.draft.config, case.batch, case.batch.input_ids
    rows = list(ids.shape)
    aux_width = config.num_aux_hidden_states * config.target_hidden_size
    found = {
        "in.input_ids": (list(ids.shape), rows[:2] + [1] * (2 - len(rows))),
        "in.attention_mask": (list(batch.attention_mask.shape), rows),
        "in.loss_mask": (list(batch.loss_mask.shape), rows),
        "in.aux_hidden_states": (list(batch.aux.shape), [*rows, aux_width]),
        "in.last_hidden_states": (list(batch.last.shape), [*rows, config.target_hidden_size]),
        "target.lm_head": (list(case.head.lm_head.shape), [config.vocab_size, config.target_hidden_size]),
        "step_loss": ([len(case.step_loss)], [case.ttt_length]),
        "step_accuracy": ([len(case.step_accuracy)], [case.ttt_length]),
    }
    trained = {name: list(parameter.shape) for name, parameter in case.draft.named_parameters()}
    for name, gradient in case.gradients.items():
        found[f"grad.{name}"] = (list(gradient.shape), trained.get(name, []))
    for name, (shape, wanted) in found.items():
        if shape != wanted:
            raise AuroraError(f"the case {path} has {name} of shape {shape}; its sizes require {wanted}")
    if missing := sorted(trained.keys() - case.gradients.keys()):
        raise AuroraError(f"the case {path} has no tensor grad.{missing[0]}")
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise AuroraError(f"the case {path} has token ids outside its vocabulary of {config.vocab_size}")


def _relative(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Relative difference: by the largest absolute values or by the 2-norms, whichever is greater."""
    difference = (found if found is not None else torch.zeros_like(wanted)) - wanted
    by_element = float(difference.abs().max()) / max(float(wanted.abs().max()), 1e-30)
    by_norm = float(difference.norm()) / max(float(wanted.norm()), 1e-30)
    worst = max(by_element, by_norm)
    return worst if math.isfinite(worst) else math.inf


if __name__ == "__main__":
    sys.exit(main())
