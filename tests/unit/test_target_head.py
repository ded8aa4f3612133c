"""The target's embedding and lm_head in a running model, by its layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from aurora_vllm.spec_decode.target_head import find_target_head

HIDDEN = 4


def model(**changes: Any) -> Any:
    embedding, head = (SimpleNamespace(weight=nn.Parameter(torch.randn(10, HIDDEN))) for _ in range(2))
    parts: dict[str, Any] = {"model": SimpleNamespace(embed_tokens=embedding), "lm_head": head}
    return SimpleNamespace(**(parts | changes))


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("name", ["embed_tokens", "embedding"])
def test_they_are_the_parameters_themselves(multimodal: bool, name: str) -> None:
    target = model()
    target.model = SimpleNamespace(**{name: target.model.embed_tokens})
    found = find_target_head(
        SimpleNamespace(get_language_model=lambda: target) if multimodal else target, HIDDEN, torch.float32
    )
    assert found is not None and not found.lm_head.requires_grad
    assert found.embedding.data_ptr() == getattr(target.model, name).weight.data_ptr()
    assert found.lm_head.data_ptr() == target.lm_head.weight.data_ptr()


def test_tied_they_are_one() -> None:
    target = model()
    target.lm_head = target.model.embed_tokens
    found = find_target_head(target, HIDDEN, torch.float32)
    assert found is not None and found.embedding is found.lm_head


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"lm_head": None},
        {"lm_head": SimpleNamespace(qweight=torch.zeros(10, HIDDEN, dtype=torch.int32))},
        {"lm_head": SimpleNamespace(weight=torch.zeros(10, HIDDEN, dtype=torch.float8_e4m3fn))},
        {"lm_head": SimpleNamespace(weight=torch.zeros(10, 2 * HIDDEN))},
        {"lm_head": SimpleNamespace(weight=torch.zeros(HIDDEN, 10).T)},
        {"lm_head": SimpleNamespace(weight=torch.zeros(10 * HIDDEN))},
    ],
)
def test_anything_else_is_left_alone(changes: dict[str, Any]) -> None:
    assert find_target_head(model(**changes), HIDDEN, torch.float32) is None
