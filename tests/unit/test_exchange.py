"""Exchanges that fail: what is live is whole afterwards, or said not to be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode.exchange import (
    AcceleratorExchange,
    Exchange,
    HalfExchanged,
    HandlerExchange,
    StagedWeights,
    Standing,
    TensorExchange,
)


class Stubborn(torch.Tensor):
    """Can be read, not written to."""

    def copy_(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: no")


def numbers(value: float) -> torch.Tensor:
    return torch.full((3,), value)


def plain(live: torch.Tensor, staged: torch.Tensor) -> Exchange:
    return TensorExchange(live, staged, torch.empty(3))


def packed(live: torch.Tensor, staged: torch.Tensor) -> Exchange:
    return HandlerExchange(*(SimpleNamespace(handler_tensor=tensor) for tensor in (live, staged)))


def fused(live: torch.Tensor, staged: torch.Tensor) -> Exchange:
    return AcceleratorExchange([live], [staged], Standing([live.clone()]))


Make = Callable[[torch.Tensor, torch.Tensor], Exchange]


@pytest.mark.parametrize("make", [plain, packed, fused])
def test_exchanged_twice_is_as_it_was(make: Make) -> None:
    live, staged = numbers(1), numbers(2)
    weights = StagedWeights(2, [make(live, staged)])
    for now in (2, 1, 2):
        weights.exchange()
        assert torch.equal(live, numbers(now))


@pytest.mark.parametrize("make", [plain, packed])
@pytest.mark.parametrize("second", [numbers(4).as_subclass(Stubborn), torch.ones(4)], ids=["half-way", "at once"])
def test_one_that_fails_undoes_itself_and_those_before_it(make: Make, second: torch.Tensor) -> None:
    live, others = numbers(1), numbers(3)
    weights = StagedWeights(2, [make(live, numbers(2)), make(others, second), make(numbers(5), numbers(6))])
    with pytest.raises(RuntimeError) as raised:
        weights.exchange()
    assert type(raised.value) is RuntimeError
    assert torch.equal(live, numbers(1)) and torch.equal(others, numbers(3))


@pytest.mark.parametrize("again", [True, False])
def test_a_fused_copy_that_fails_half_way(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """A GPU on which nothing works after an error, and one on which the next call does."""
    lives = [numbers(1), numbers(2)]
    exchange = AcceleratorExchange(lives, [numbers(3), numbers(4)], Standing([tensor.clone() for tensor in lives]))
    copy, calls = torch._foreach_copy_, [0]

    def fail(live: list[torch.Tensor], staged: list[torch.Tensor], non_blocking: bool) -> None:
        calls[0] += 1
        if calls[0] == 1:
            live[0].copy_(staged[0])
        elif again:
            return copy(live, staged, non_blocking)
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    with pytest.raises(RuntimeError, match="launch failure") as raised:
        StagedWeights(2, [exchange]).exchange()
    assert (type(raised.value) is HalfExchanged) is not again
    assert torch.equal(lives[0], numbers(1 if again else 3)) and torch.equal(lives[1], numbers(2))
    monkeypatch.undo()
    if again:
        exchange()
        assert torch.equal(lives[0], numbers(3)) and torch.equal(lives[1], numbers(4))


def test_what_cannot_be_undone_is_told() -> None:
    def once() -> None:
        if runs:
            raise RuntimeError("not again")
        runs.append(1)

    def fail() -> None:
        raise ValueError("not at all")

    runs: list[int] = []
    with pytest.raises(HalfExchanged, match="not at all; and undoing it failed: not again"):
        StagedWeights(2, [once, fail]).exchange()
