"""A target with additional layers that change nothing: the same answers, token for token, but slower steps.

How much a draft gains depends on the cost of its pass relative to the target's step. For SmolLM2-135M this ratio is
high. For the models that people serve it is low, but none of those runs on two cores. Layers that add zero to the
residual stream give the low ratio without such a model: text and hidden states, and so drafts and copies, do not
change, only the target's step takes longer. The layers are inserted in the middle, so that the three states that an
EAGLE-3 draft reads (the inputs of layers 2, n / 2 and n - 3, ``draft_config`` in ``learner/day0.py``) do not change.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.config_json import read_config, write_config
from aurora_vllm.learner.staging import appears_whole

LAYER = "model.layers."
WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # only these write to the residual stream


def deepened(model: Path, more: int) -> Path:
    """The model with ``more`` layers that change nothing, in a directory beside it; made if it does not exist.

    Args:
        model: directory of a Llama checkpoint whose weights are one file.
        more: layers to add; for 0, ``model`` itself is returned.
    """
    if not more:
        return model
    out = model.with_name(f"{model.name}-deeper-{more}")
    if out.is_dir():
        return out
    config = read_config(model)
    layers = config["num_hidden_layers"]
    with appears_whole(out, private=False) as directory:
        for file in model.iterdir():
            if file.name not in ("model.safetensors", "config.json"):
                shutil.copy(file, directory)
        write_config(directory, config | {"num_hidden_layers": layers + more})
        weights = _with_layers(load_file(model / "model.safetensors"), layers // 2, more)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return out


def _with_layers(weights: dict[str, torch.Tensor], at: int, more: int) -> dict[str, torch.Tensor]:
    """Insert ``more`` copies of layer ``at`` before it, with zeros for the weights in WRITERS."""
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
