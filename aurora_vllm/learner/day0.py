"""Day-0 draft: an EAGLE-3 checkpoint made from the target's own weights, before any traffic.

A random draft needs tens of thousands of tokens before it proposes anything useful. The target already contains most
of what a draft needs: a norm and an ``lm_head`` that read the residual stream, and layers that write to it. So the
draft is one of the target's late layers, fed with the residual stream that enters this layer:

    fc          [0 0 I]: the last auxiliary state passes through, the other two have no effect at first
    q/k/v       [0 | W]: act on the hidden half of ``[embedding, hidden]``, the embedding half has no effect at first
    o, MLP      the target layer's own, and so are the norms (day0_layer.py; quantized or MoE: without effect at first)
    norm, head  the target's, the head restricted to the draft vocabulary

It does not predict well before training (its input contains token t, and it should predict t+2), but it learns an order
of magnitude faster than a random draft, because it only has to learn corrections. If the target is small enough for the
closed-form lesson (lesson.py), the draft gets as many key-value heads as query heads, because the lesson writes one
value per channel, and further heads for copying (induction.py), without effect until then; else it keeps the target's.

The format is the one that plain vLLM loads with ``--speculative-config '{"method": "eagle3", "model": DIR, ...}'``
(vllm/model_executor/models/llama_eagle3.py); there is no ``embed_tokens`` in it, which makes vLLM share the target's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aurora_vllm.config_json import read_config, write_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner import lesson_shape
from aurora_vllm.learner.day0_layer import FLOATS, Day0Layer, Tensors
from aurora_vllm.learner.eagle3_config import rope_parameters
from aurora_vllm.learner.rope import inverse_frequencies
from aurora_vllm.learner.staging import appears_whole
from aurora_vllm.learner.stored_tensors import StoredTensors
from aurora_vllm.learner.vocabulary import day0_vocabulary, vocabulary_maps

RECIPE = 3  # to be increased with each change here, so that cached drafts are made anew
MAX_VOCABULARY = 32_768
_NEEDED_KEYS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size")
# Keys of the target's config.json that define a Llama decoder layer, copied as they are.
_LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "max_position_embeddings", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
    "initializer_range",
)  # fmt: skip
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")  # the last in transformers 5, the others in 4
_OFFSET_NORMS = ("gemma", "qwen3_next", "qwen3_5")  # their norms multiply by the stored weight plus one


def make_day0_draft(target: Path, out: Path, draft_vocab_size: int | None = None) -> Path:
    """Write the day-0 draft of a target.

    Args:
        target: directory of a Llama-shaped checkpoint (SmolLM2, Mistral, Qwen2, Qwen3): config.json and safetensors.
            Its layers may be quantized, its MLPs mixtures of experts.
        out: directory to write; appears complete or not at all, and replaces an older one.
        draft_vocab_size: see :func:`vocabulary_size`.

    Returns:
        ``out``, holding config.json and model.safetensors.

    Raises:
        ValueError: the target's layers have another shape; names the tensor or key that is missing.
        AuroraError: there is no config.json.
        FileNotFoundError: there are no safetensors files.
    """
    config = read_config(target)
    own = draft_config(config, draft_vocab_size)
    weights = StoredTensors(target)
    layer = min(own["eagle_aux_hidden_state_layer_ids"][-1], config["num_hidden_layers"] - 1)
    draft_ids = day0_vocabulary(target, config["vocab_size"], own["draft_vocab_size"])
    _write(out, own, _draft_tensors(weights, config, own, layer, draft_ids))
    return out


def vocabulary_size(config: dict[str, Any], wanted: int | None = None) -> int:
    """Number of tokens a draft may propose: ``wanted``, or 8 x hidden size (4,608 for SmolLM2-135M, 32,768 for
    Qwen3-8B, as in published EAGLE-3 heads), so that the head's share of the draft's parameters is about constant.

    At most V - 1: a draft over the full vocabulary, its head equal to the target's, is served by vLLM from the
    *target's* lm_head (SpecDecodeBaseProposer._maybe_share_lm_head), which no update may touch.

    Args:
        config: the target's config.json.
    """
    return min(wanted or min(8 * config["hidden_size"], MAX_VOCABULARY), config["vocab_size"] - 1)


def draft_config(config: dict[str, Any], draft_vocab_size: int | None = None) -> dict[str, Any]:
    """The config.json of a target's day-0 draft. config: the target's.

    Raises:
        ValueError: no draft can be made from a target of this shape.
    """
    missing = [key for key in _NEEDED_KEYS if key not in config]
    if missing:
        raise ValueError(f"the target's config.json has no {', '.join(missing)}: not a Llama-shaped model")
    if str(config.get("model_type")).startswith(_OFFSET_NORMS):
        raise ValueError(f"it is a {config['model_type']}: not a Llama-shaped model")
    aux_layer_ids = auxiliary_layers(config["num_hidden_layers"])
    return {
        **{key: config[key] for key in _LAYER_KEYS if config.get(key) is not None},
        **_rope(config),
        **_heads(config, len(aux_layer_ids)),
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": vocabulary_size(config, draft_vocab_size),
        # Where vLLM reads them: GPUModelRunner._get_eagle3_aux_layers_from_config, llama_eagle3.LlamaModel.
        "eagle_aux_hidden_state_layer_ids": list(aux_layer_ids),
        "num_aux_hidden_states": len(aux_layer_ids),
        "target_hidden_size": config["hidden_size"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def auxiliary_layers(num_layers: int) -> tuple[int, int, int]:
    """Three distinct auxiliary layer ids; id k means the residual stream that enters layer k.

    From seven layers on ``(2, L//2, L-3)``, as in EAGLE-3 and vLLM (``get_eagle3_default_aux_hidden_state_layers``).
    With fewer, some of these coincide and vLLM would silently merge them, so small targets get ids spread further.

    Raises:
        ValueError: fewer than two layers.
    """
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    if num_layers >= 4:
        return 1, num_layers // 2, num_layers - 1
    if num_layers >= 2:
        return 0, 1, 2
    raise ValueError(f"an EAGLE-3 draft needs a target of at least 2 layers, this one has {num_layers}")


def _draft_tensors(
    weights: StoredTensors, config: dict[str, Any], own: dict[str, Any], layer: int, draft_ids: torch.Tensor
) -> Tensors:
    """EAGLE-3 tensors under their Hugging Face names. config: the target's; own: the draft's."""
    head = weights["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]  # [V, H]
    if head.dtype not in FLOATS:
        raise ValueError(f"its lm_head is quantized ({head.dtype})")
    hidden = head.shape[1]
    fc = torch.zeros(hidden, own["num_aux_hidden_states"] * hidden, dtype=head.dtype)
    fc[:, -hidden:] = torch.eye(hidden, dtype=head.dtype)
    d2t, t2d = vocabulary_maps(draft_ids, config["vocab_size"])
    tensors = {
        "fc.weight": fc,
        **Day0Layer(weights, layer, config).tensors(own),
        "norm.weight": weights["model.norm.weight"],
        "lm_head.weight": head[draft_ids],
        "d2t": d2t,
        "t2d": t2d,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _heads(config: dict[str, Any], num_aux: int) -> dict[str, int]:
    """The draft's heads: as the closed-form lesson needs them if it can be given, else the target's."""
    heads, head_dim = int(config["num_attention_heads"]), _head_dim(config)
    grouped = int(config.get("num_key_value_heads") or heads)
    needed = lesson_shape.heads_for(config["hidden_size"], heads, head_dim, grouped, num_aux)
    return {
        "num_attention_heads": needed or heads,
        "num_key_value_heads": needed or grouped,
        "head_dim": head_dim,
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The target's rotary embedding; where no draft can be trained with it (YaRN), the plain one with its base. The
    draft learns to attend anew anyway."""
    rope = rope_parameters(config)
    try:
        inverse_frequencies(_head_dim(config), rope)
    except AuroraError:
        return {"rope_theta": rope["rope_theta"]}
    return {key: config[key] for key in _ROPE_KEYS if config.get(key) is not None}


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write(out: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """An older draft is moved away only at the very end, so that ``out`` is never incomplete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside,
        appears_whole(out, private=False) as staging,  # not private: a server may run as another user
    ):
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        write_config(staging, config)
        if out.exists():
            out.rename(Path(aside) / "replaced")
