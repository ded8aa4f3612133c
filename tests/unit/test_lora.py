"""The draft beside LoRA adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode.lora import read_plain_embeddings


class Wrapped(torch.nn.Module):
    """As vLLM wraps an embedding: rows by a mapping of the target's tokens, which are other ones in a second pass."""

    def __init__(self, base_layer: torch.nn.Embedding, mapped: int) -> None:
        super().__init__()
        self.base_layer, self.mapped = base_layer, mapped

    def forward(self, ids: torch.Tensor) -> Any:
        return self.base_layer(ids) + torch.zeros(self.mapped, 1)


def test_a_draft_reads_plain_embeddings_whatever_the_targets_tokens_were() -> None:
    shared = torch.nn.Embedding(8, 4)
    draft = SimpleNamespace(model=SimpleNamespace(embed_tokens=Wrapped(shared, mapped=5)))
    ids = torch.tensor([1, 2])
    with pytest.raises(RuntimeError):
        draft.model.embed_tokens(ids)
    assert read_plain_embeddings(draft)
    assert draft.model.embed_tokens is shared and draft.model.embed_tokens(ids).shape == (2, 4)
    assert not read_plain_embeddings(draft)  # one of its own, or without adapters
