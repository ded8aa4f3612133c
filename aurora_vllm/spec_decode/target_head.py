"""Finds the running target's embedding and lm_head, in the way of vLLM's own EAGLE proposer, which shares them."""

from __future__ import annotations

from typing import Any

import torch

from aurora_vllm.transport.placement import HeadTensors


def find_target_head(target: Any, hidden_size: int, dtype: torch.dtype) -> HeadTensors | None:
    """The two matrices; None where they are not plain ones (a quantised lm_head, an embedding that is computed, a model
    of another layout).

    Args:
        target: vLLM's model, as in ``LLMBaseProposer._maybe_share_embeddings``: a multimodal one has a language model.
        hidden_size, dtype: of the target.
    """
    language_model = target.get_language_model() if hasattr(target, "get_language_model") else target
    inner = getattr(language_model, "model", None)
    embedding = getattr(inner, "embed_tokens", getattr(inner, "embedding", None))
    found: dict[int, torch.Tensor] = {}  # tied weights are one parameter
    for module in (embedding, getattr(language_model, "lm_head", None)):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_contiguous():
            return None
        if weight.dtype != dtype or weight.shape[1] != hidden_size:
            return None
        found.setdefault(id(weight), weight.detach())
    both = list(found.values())
    return HeadTensors(both[0], both[-1])
