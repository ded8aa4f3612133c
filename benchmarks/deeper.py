"""A target with more layers that change nothing: it answers as before, token for token, and takes longer for it.

What a draft is worth depends on how long its pass takes beside the target's step. On SmolLM2-135M it takes long; on the
models people serve it does not, and none of those runs on two cores. Layers that add zero to the residual stream give
the ratio without such a model: text, hidden states and so drafts and copies stay what they are, only the target's step
grows. The layers go into the middle, where each of the three states that an EAGLE-3 draft reads (those that enter
layers 2, n / 2 and n - 3, ``draft_config`` in ``learner/day0.py``) stays what it was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.learner.staging import appears_whole

LAYER = "model.layers."
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # what a layer adds to the residual stream is theirs


def deepened(model: Path, more: int) -> Path:
    """The model with ``more`` layers that change nothing, beside it; made where it is not there yet.

    Args:
        model: directory of a Llama checkpoint in one file; returned as it is for 0 layers.
        more: layers to add.
    """
    if not more:
        return model
    out = model.with_name(f"{model.name}-deeper-{more}")
    if out.is_dir():
        return out
    config = json.loads((model / "config.json").read_text())
    layers = config["num_hidden_layers"]
    with appears_whole(out, private=False) as directory:
        for file in model.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                shutil.copy(file, directory)
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers + more}, indent=2))
        weights = _with_layers(load_file(model / "model.safetensors"), layers // 2, more)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return out


def _with_layers(weights: dict[str, torch.Tensor], at: int, more: int) -> dict[str, torch.Tensor]:
    """``more`` layers before layer ``at``, which read as that layer does and write nothing."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not name.startswith(LAYER):
            out[name] = tensor
            continue
        number, part = name.removeprefix(LAYER).split(".", 1)
        layer = int(number)
        out[f"{LAYER}{layer + more if layer >= at else layer}.{part}"] = tensor
        if layer == at:
            silent = torch.zeros_like(tensor) if part in WRITERS else tensor
            out |= {f"{LAYER}{at + i}.{part}": silent.clone() for i in range(more)}
    return out
