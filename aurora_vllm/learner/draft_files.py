"""Reads the files of an EAGLE-3 draft in any of the formats that vLLM loads, as if they were of one format.

- EAGLE-3 (yuhuili, AngelSlim, this project): a flat ``config.json``; tensors ``midlayer.*``, ``fc``, ``norm``,
  ``lm_head``, ``d2t``, ``t2d``, in safetensors or in ``pytorch_model.bin``.
- speculators (``speculators_model_type: "eagle3"``): the layer's keys lie under ``transformer_layer_config``, and the
  layer is called ``layers.0``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aurora_vllm.errors import AuroraError, DamagedFile

# vllm/transformers_utils/configs/speculators/algos.py: update_eagle3
_ARCHITECTURES = {"llama": "Eagle3LlamaForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM"}
# Pickles without weights: vllm/model_executor/model_loader/weight_utils.py, filter_files_not_needed_for_inference.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin")


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A draft's ``config.json`` in the flat form of an EAGLE-3 checkpoint; a flat one is returned unchanged.

    A speculators config is read as in vLLM (``update_eagle3``). Keys missing in its ``transformer_layer_config`` have
    transformers' defaults: speculators writes only those that differ (``to_diff_dict``).

    Raises:
        AuroraError: the speculator or its layer is of another kind.
    """
    if "speculators_model_type" not in config:
        return config
    from transformers import AutoConfig

    kind = config["speculators_model_type"]
    if kind != "eagle3":
        raise AuroraError(f"the draft is a speculator of type {kind!r}", "Aurora trains EAGLE-3 drafts")
    layer = dict(config.get("transformer_layer_config") or {})
    model_type = layer.pop("model_type", "llama")
    if model_type not in _ARCHITECTURES:
        raise AuroraError(f"the draft's layer is of type {model_type!r}", f"vLLM knows {', '.join(_ARCHITECTURES)}")
    flat = AutoConfig.for_model(model_type, **layer).to_dict()
    flat["architectures"] = [_ARCHITECTURES[model_type]]
    flat["model_type"] = model_type
    flat["norm_before_residual"] = config.get("norm_before_residual", True)
    for key in ("draft_vocab_size", "target_hidden_size", "norm_before_fc", "fc_norm", "norm_output"):
        if config.get(key) is not None:
            flat[key] = config[key]
    if config.get("eagle_aux_hidden_state_layer_ids"):
        flat["eagle_aux_hidden_state_layer_ids"] = config["eagle_aux_hidden_state_layer_ids"]
    return flat


def weight_files(directory: Path) -> list[Path]:
    """The files that vLLM takes weights from: safetensors or, if there are none, pickles. May be empty."""
    pickles = (path for path in directory.glob("*.bin") if path.name not in _NO_WEIGHTS)
    return sorted(directory.glob("*.safetensors")) or sorted(pickles)


def read_tensors(directory: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Every tensor of a draft, by its EAGLE-3 name.

    Args:
        device: "meta" for shapes and dtypes without data.

    Raises:
        DamagedFile: there are no weights, or a file is damaged, or is a pickle with more than tensors in it.
    """
    files = weight_files(directory)
    if not files:
        raise DamagedFile(f"no draft in {directory}: there is no *.safetensors and no *.bin file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found = load_file(file, device="cpu")
                found = {name: tensor.to(device) for name, tensor in found.items()} if device != "cpu" else found
            else:
                found = torch.load(file, map_location=device, weights_only=True)
            if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
                raise ValueError("more than tensors in it")
        except Exception as error:  # a damaged pickle may raise anything
            raise DamagedFile(f"{file} cannot be read ({type(error).__name__}: {error})", "download it again") from None
        tensors.update({canonical_name(name): tensor for name, tensor in found.items()})
    return tensors


def canonical_name(name: str) -> str:
    """A tensor's EAGLE-3 name."""
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def speculators_name(name: str) -> str:
    """The reverse: a tensor's name in the speculators format."""
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
