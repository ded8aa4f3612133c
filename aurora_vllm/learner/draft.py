"""The EAGLE-3 draft in plain torch, for training: one Llama or Qwen3 layer that reads the target's states.

It computes what ``vllm/model_executor/models/llama_eagle3.py`` (or ``qwen3_eagle3.py``) computes, and its tensors have
the names of a Hugging Face EAGLE-3 checkpoint. Here are the weights and the row-wise parts; attention between rows is
in unroll.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from aurora_vllm.config_json import read_config, write_config
from aurora_vllm.errors import AuroraError
from aurora_vllm.learner.draft_files import flatten, read_tensors
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.rope import inverse_frequencies
from aurora_vllm.transport.bank_layout import TensorSpec


class RMSNorm(nn.Module):
    """x / rms(x) * weight. [..., size] -> [..., size]"""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections of the draft's attention; q, k and v read ``[token embedding, hidden]``, 2H wide."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(2 * config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, key, bias=config.attention_bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, key, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)


class MLP(nn.Module):
    """SwiGLU. [..., H] -> [..., H]"""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Midlayer(nn.Module):
    """The draft's only layer."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Eagle3Draft(nn.Module):
    """An EAGLE-3 draft. ``state_dict`` has the tensors of a checkpoint, with ``d2t`` and without ``embed_tokens``.

    ``d2t`` is int64 [D], offsets: draft id i stands for target id ``i + d2t[i]`` (all zero for the full vocabulary).
    ``embed_tokens`` is float [V, H], frozen, or None where the draft uses the target's embedding.
    """

    d2t: torch.Tensor
    frequencies: torch.Tensor
    embed_tokens: torch.Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config.hidden_size, config.rms_norm_eps
        aux_width = config.num_aux_hidden_states * config.target_hidden_size
        if config.norm_before_fc:
            self.input_norm = RMSNorm(aux_width, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(config.target_hidden_size, eps) for _ in range(config.num_aux_hidden_states)
            )
        self.fc = nn.Linear(aux_width, hidden, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("frequencies", inverse_frequencies(config.head_dim, config.rope), persistent=False)
        self.register_buffer("embed_tokens", None, persistent=False)

    @property
    def target_ids(self) -> torch.Tensor:
        """Target id of each draft id. int64 [D]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def combine(self, aux: torch.Tensor) -> torch.Tensor:
        """The hidden state of unroll step 0. aux: [N, num_aux * target H] -> [N, H]."""
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            parts = aux.chunk(self.config.num_aux_hidden_states, dim=-1)
            aux = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(aux)

    def finish(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The rest of the layer. attended: [N, heads * head_dim], residual: [N, H] -> [N, H], before ``norm``."""
        residual = residual + self.midlayer.self_attn.o_proj(attended)
        return residual + self.midlayer.mlp(self.midlayer.post_attention_layernorm(residual))


def load_draft(directory: Path) -> Eagle3Draft:
    """Read a checkpoint, in any format of draft_files.py, as float32.

    Raises:
        AuroraError: there is no checkpoint, its config is unusable, or a tensor is missing, unknown or of another
            shape.
    """
    draft = Eagle3Draft(Eagle3Config.from_hf(load_config(directory)))
    load_tensors(draft, read_tensors(directory))
    return draft


def load_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json`` in flat form.

    Raises:
        AuroraError: there is none, or it describes another kind of draft.
    """
    return flatten(read_config(directory))


def load_tensors(draft: Eagle3Draft, tensors: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint's tensors into a draft. ``t2d`` is redundant and ignored; ``embed_tokens`` is optional.

    Raises:
        AuroraError: names the tensor that is missing, unknown or of another shape.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "t2d"}
    embedding = tensors.pop("embed_tokens.weight", None)
    own = draft.state_dict()
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        tensors.setdefault("d2t", torch.zeros_like(draft.d2t))
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise AuroraError(f"the draft has no tensor {name}")
        if name not in own:
            raise AuroraError(f"the draft has a tensor {name} that an EAGLE-3 draft of its config has not")
        if tensors[name].shape != own[name].shape:
            found, needed = list(tensors[name].shape), list(own[name].shape)
            raise AuroraError(f"the draft's tensor {name} has shape {found}, its config says {needed}")
    if embedding is not None and embedding.shape != (draft.config.vocab_size, draft.config.hidden_size):
        raise AuroraError(f"the draft's tensor embed_tokens.weight has shape {list(embedding.shape)}")
    if embedding is None and draft.config.target_hidden_size != draft.config.hidden_size:
        raise AuroraError("the draft is not as wide as the target and has no embed_tokens.weight of its own")
    draft.load_state_dict(tensors)
    draft.embed_tokens = embedding.to(draft.d2t.device).float() if embedding is not None else None


def save_draft(draft: Eagle3Draft, directory: Path, config: dict[str, Any]) -> None:
    """Write model.safetensors and config.json so that plain vLLM loads them.

    Args:
        draft: the draft; its tensors are written in the dtype ``config["torch_dtype"]`` (float32 without it).
        directory: made if it does not exist.
        config: the ``config.json`` to write, as it was read.
    """
    dtype = stored_dtype(config)
    config = {key: value for key, value in config.items() if key != "dtype"}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(draft, dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, config)


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype named by ``torch_dtype``, or by ``dtype`` (transformers 5); float32 without either."""
    name = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    return getattr(torch, name)


def checkpoint_tensors(draft: Eagle3Draft, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this draft, with ``t2d`` and its own embedding, if any; contiguous, on the CPU."""
    tensors = {name: t.to("cpu").contiguous() for name, t in bank_tensors(draft, dtype).items()}
    if draft.embed_tokens is not None:
        tensors["embed_tokens.weight"] = draft.embed_tokens.to("cpu", dtype).contiguous()
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        del tensors["d2t"]  # vLLM does not expect it where both vocabularies are the same
    else:
        tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
        tensors["t2d"][draft.target_ids.cpu()] = True
    return tensors


def bank_specs(draft: Eagle3Draft, dtype: torch.dtype = torch.float32) -> list[TensorSpec]:
    """Specs of a weight bank for this draft: its state_dict, with weights in ``dtype`` (that of vLLM's draft)."""
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in bank_tensors(draft, dtype).items()]


def bank_tensors(draft: Eagle3Draft, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors to publish, by name; without a copy where the dtype is the same."""
    return {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in draft.state_dict().items()}
