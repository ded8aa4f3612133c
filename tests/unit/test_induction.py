"""What codes are made of: the directions that can best be told one position ahead."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner import induction
from aurora_vllm.learner.induction import canonical_pairs, code_channels


def correlated(rows: int, correlations: list[float], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of 9 and 7 channels, mixed at random, whose canonical correlations are about these, then zero."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, 9, generator=generator), torch.randn(rows, 7, generator=generator)
    for i, correlation in enumerate(correlations):
        y[:, i] = correlation * x[:, i] + (1 - correlation**2) ** 0.5 * y[:, i]
    return x @ _mixing(9, generator), y @ _mixing(7, generator)


def test_canonical_pairs_of_fewer_rows_than_channels() -> None:
    """What the dual form finds is what it finds where zeros, which tell nothing, are more rows than channels."""
    x, y = correlated(24, [0.9, 0.8, 0.7, 0.6], seed=3)
    wider = torch.nn.functional.pad(x, (0, 60)), torch.nn.functional.pad(y, (0, 60))
    ahead, key = canonical_pairs(*wider, 2)
    padded = tuple(torch.nn.functional.pad(z, (0, 0, 0, 100)) for z in wider)
    for found, other in zip((ahead, key), canonical_pairs(*padded, 2), strict=True):
        signs = (found * other).sum(0).sign()
        torch.testing.assert_close(found, other * signs, atol=2e-3, rtol=0)


def _mixing(size: int, generator: torch.Generator) -> torch.Tensor:
    """Turns and stretches, by no more than float32 can take back."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q * torch.linspace(0.5, 2, size)


def by_svd(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Canonical correlations: cosines between the two column spaces (Bjorck and Golub, 1973)."""
    (of_x, _), (of_y, _) = (np.linalg.qr(z.double().numpy()) for z in (x, y))
    return np.linalg.svd(of_x.T @ of_y, compute_uv=False)


@settings(max_examples=25)
@given(st.integers(0, 99), st.lists(st.floats(0.3, 0.95), min_size=2, max_size=4))
def test_canonical_pairs_are_those_of_a_dense_solution(seed: int, planted: list[float]) -> None:
    x, y = correlated(800, planted, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(induction, "RIDGE", 1e-7)
        ahead, key = canonical_pairs(x, y, 3)
    expected = by_svd(x, y)[:3]
    told, seen = x @ ahead, y @ key
    torch.testing.assert_close(seen.T @ seen, torch.eye(3), atol=2e-2, rtol=0)
    # What x tells of a direction is its regression: as long as the correlation, and no longer.
    torch.testing.assert_close(told.norm(dim=0).double(), torch.from_numpy(expected), atol=2e-2, rtol=0)
    torch.testing.assert_close((told * seen).sum(0).double(), torch.from_numpy(expected**2), atol=2e-2, rtol=0)


@given(st.integers(1, 8192), st.sampled_from([16, 32, 64, 128, 256]))
def test_codes_have_room(hidden: int, head_dim: int) -> None:
    size = code_channels(hidden, head_dim)
    assert size % 2 == 0 and size <= head_dim // 2 and 2 * size <= hidden / 8
