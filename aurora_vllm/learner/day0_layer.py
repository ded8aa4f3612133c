"""The decoder layer that a day-0 draft starts with: one of the target's, as far as its weights can be read.

Attention and MLP are taken over where they are a Llama layer's and stored in a floating-point dtype. Where one is not,
because the target is quantized or a mixture of experts, it starts silent: its input projections are random, its output
projection is zero. The residual stream then passes unchanged, and the first gradient reaches the output projection (the
zero-initialised residual branches of Zhang et al., "Fixup Initialization", arXiv 1901.09321).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from aurora_vllm.config_json import quantization
from aurora_vllm.learner.stored_tensors import StoredTensors

Tensors = dict[str, torch.Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # float8 means nothing without its scales
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = {"self_attn.qkv_proj": _ATTENTION[:3], "mlp.gate_up_proj": _MLP[:2]}  # as Phi-3 stores them
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
# Neither a stored RoPE (old checkpoints) nor gpt-oss' attention sinks, like its biases, are needed to start with.
_PARTS = tuple(f"{part}." for part in (*_ATTENTION, *_MLP, *_FUSED, *_NORMS, "self_attn.rotary_emb"))
_KNOWN = (*_PARTS, "self_attn.sinks")


class Day0Layer:
    """A layer of the target, as the start of a draft's.

    Args:
        weights: the target's.
        layer: its number.
        config: the target's config.json.

    Raises:
        ValueError: it is not a Llama layer; names what it has that those have not.
    """

    def __init__(self, weights: StoredTensors, layer: int, config: dict[str, Any]) -> None:
        self._weights, self._prefix = weights, f"model.layers.{layer}."
        self._quantized = bool(quantization(config))
        heads = config["num_attention_heads"]
        grouped = config.get("num_key_value_heads") or heads
        self._shares = {"self_attn.qkv_proj": (heads, grouped, grouped), "mlp.gate_up_proj": (1, 1)}
        names = (name.removeprefix(self._prefix) for name in weights.names() if name.startswith(self._prefix))
        more = sorted(name for name in names if not name.startswith(_KNOWN))
        self._is_moe = any(name.startswith("mlp.") for name in more)
        for name in more:
            scale = self._quantized and name.startswith("self_attn.") and name.endswith("_scale")  # of the KV cache
            if not scale and not name.startswith("mlp."):
                part = name.removesuffix(".weight")
                raise ValueError(f"its layers have {part}, which Llama's do not: not a Llama-shaped model")

    def tensors(self, own: dict[str, Any]) -> Tensors:
        """The draft's layer, under its Hugging Face names. own: the draft's config.json.

        Raises:
            ValueError: the target lacks a tensor; names it.
        """
        norm = self._weights[self._prefix + "input_layernorm.weight"]  # [H]
        return {
            # Normalises the token embedding, as the target's first layer does.
            "midlayer.input_layernorm.weight": self._weights["model.layers.0.input_layernorm.weight"],
            "midlayer.hidden_norm.weight": norm,
            "midlayer.post_attention_layernorm.weight": self._weights[self._prefix + "post_attention_layernorm.weight"],
            **self._attention(own, norm),
            **self._mlp(own, norm),
        }

    def _attention(self, own: dict[str, Any], input_norm: torch.Tensor) -> Tensors:
        hidden, dim = len(input_norm), own["head_dim"]
        query_rows, key_rows = own["num_attention_heads"] * dim, own["num_key_value_heads"] * dim
        names = [f"midlayer.{name}.weight" for name in _ATTENTION]
        if (read := self._read(_ATTENTION)) is None:
            shapes = [(rows, 2 * hidden) for rows in (query_rows, key_rows, key_rows)]
            silent = silent_branch([*shapes, (hidden, query_rows)], input_norm.dtype)
            return dict(zip(names, silent, strict=True))
        *inputs, output = read
        tensors = {}
        for kind, name, weight in zip("qkv", names[:3], inputs, strict=True):  # weight: [the target's heads * D, H]
            norm = self._weights.get(f"{self._prefix}self_attn.{kind}_norm.weight")
            if norm is not None:
                weight = _fold_head_norm(weight, norm, input_norm)
            if kind != "q" and key_rows != len(weight):  # for the lesson: one head for each query head
                copies = output.shape[1] // len(weight)
                weight = weight.unflatten(0, (-1, dim)).repeat_interleave(copies, dim=0).flatten(0, 1)
            weight = weight[torch.arange(query_rows if kind == "q" else key_rows) % len(weight)]  # and further heads
            tensors[name] = torch.cat([torch.zeros_like(weight), weight], dim=1)  # of [embedding, hidden]
        tensors[names[-1]] = F.pad(output, (0, query_rows - output.shape[1]))  # further heads get zeros
        return tensors

    def _mlp(self, own: dict[str, Any], norm: torch.Tensor) -> Tensors:
        names = [f"midlayer.{name}.weight" for name in _MLP]
        if self._is_moe or (weights := self._read(_MLP)) is None:
            hidden, inner = len(norm), own["intermediate_size"]
            weights = silent_branch([(inner, hidden), (inner, hidden), (hidden, inner)], norm.dtype)
        return dict(zip(names, weights, strict=True))

    def _read(self, parts: tuple[str, ...]) -> list[torch.Tensor] | None:
        """Weights of linear layers; None where they are quantized. Raises ValueError where one is missing."""
        try:
            found = [self._weight(part) for part in parts]
        except ValueError:
            if self._quantized:  # packed integers have other names
                return None
            raise
        return found if all(weight.dtype in FLOATS for weight in found) else None

    def _weight(self, part: str) -> torch.Tensor:
        """One linear layer's, cut out of a fused one where the target stores it so. [rows, columns]"""
        for name, members in _FUSED.items():
            fused = self._weights.get(f"{self._prefix}{name}.weight") if part in members else None
            if fused is not None:
                shares = self._shares[name]
                unit = len(fused) // sum(shares)
                return fused.split([share * unit for share in shares])[members.index(part)]
        return self._weights[f"{self._prefix}{part}.weight"]


def silent_branch(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Weights of a residual branch without effect: random input projections, and an output projection of zeros.

    Args:
        shapes: [rows, columns] of each of its linear layers, its output projection last.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) * shape[1] ** -0.5 for shape in shapes[:-1]]
    return [weight.to(dtype) for weight in (*inputs, torch.zeros(*shapes[-1]))]


def _fold_head_norm(weight: torch.Tensor, norm: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """Fold Qwen3's per-head q_norm or k_norm into the projection, since a Llama draft layer has no such norm.

    RMSNorm divides by the head's RMS, which depends on the token. This divides by its expected value instead, for an
    input of independent components with unit RMS, scaled by ``input_norm``. The approximation suffices, because the
    draft is trained anyway.

    Args:
        weight: [heads * head_dim, H]; norm: [head_dim]; input_norm: [H].
    """
    heads = weight.float().view(-1, len(norm), weight.shape[1])  # [heads, head_dim, H]
    expected_rms = (heads * input_norm.float()).square().sum(-1).mean(-1).sqrt()  # [heads]
    folded = heads * norm.float()[None, :, None] / expected_rms[:, None, None]
    return folded.view_as(weight).to(weight.dtype)
