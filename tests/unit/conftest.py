"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest
import torch

from aurora_vllm.learner import learner


@pytest.fixture
def same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chance, and no clock: scoring goes first, whatever it costs."""
    torch.manual_seed(0)
    monkeypatch.setattr(learner, "JUDGING_SHARE", 1e9)
    monkeypatch.setattr(learner, "WATCHING_SHARE", 1e9)
