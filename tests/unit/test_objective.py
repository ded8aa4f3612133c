"""The family of objectives against numpy: the cost of a row, whole trajectories, and their gradients."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner import attention, divergence
from aurora_vllm.learner.divergence import Terms
from aurora_vllm.learner.loss import LossOutput, ttt_loss
from aurora_vllm.learner.objective import Direction, Forward, Objective, Reverse
from aurora_vllm.learner.train import Trainer
from tests.unit.naive_eagle3 import Sizes, random_case
from tests.unit.reference_objective import (
    Case,
    accepted_cost,
    forward_cost,
    gradients,
    in_float64,
    reference_objective,
    reverse_cost,
    with_branches,
)

DIRECTIONS = get_args(Direction)


# --- one row ---


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 12), st.integers(0, 14), st.sampled_from([0.1, 1, 8]))
def test_the_references_gradients_are_derivatives(seed: int, rows: int, width: int, k: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    target, logits = scale * rng.normal(size=(2, rows, width))
    emitted = rng.integers(-1, width, rows)
    for cost in (
        lambda x: forward_cost(target, x, k),
        lambda x: reverse_cost(target, x),
        lambda x: reverse_cost(target, x, emitted),
    ):
        gradient = cost(logits)[1]
        for v in range(width):
            step = 1e-6 * np.eye(width)[v]
            slope = (cost(logits + step)[0] - cost(logits - step)[0]) / 2e-6
            assert gradient[:, v] == pytest.approx(slope, abs=1e-7 * (1 + scale**2))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 9),
    width=st.integers(1, 12),
    k=st.integers(0, 14),
    direction=st.sampled_from(DIRECTIONS),
    logit_scale=st.sampled_from([1.0, 0.5]),
)
def test_cost_and_gradient_of_every_member_are_numpys(
    seed: int, rows: int, width: int, k: int, direction: Direction, logit_scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps, hidden_size = 2, 3
    target_states, target_head, lm_head = (
        torch.randn(n, hidden_size, generator=generator) for n in (rows, width, width)
    )
    hidden = [torch.randn(rows, hidden_size, generator=generator, requires_grad=True) for _ in range(steps)]
    lm_head.requires_grad_()
    emitted = torch.randint(-1, width, (rows,), generator=generator)
    terms = [Terms(torch.arange(rows), torch.rand(rows, generator=generator), 0.7**i) for i in range(steps)]
    target = (target_states.double() @ target_head.double().T).numpy()

    members: list[tuple[Forward | Reverse, Any]] = [
        (Objective(direction).accepted, lambda x: accepted_cost(Objective(direction), target, x, emitted.numpy())),
        (Objective(discard_top_k=k).discard, lambda x: forward_cost(target, x, k)),
    ]
    for member, reference in members:
        for one in (*hidden, lm_head):
            one.grad = None
        total, step_loss, _ = divergence.divergence(
            hidden, lm_head, target_states, target_head, terms, member, emitted, logit_scale
        )
        total.backward()  # type: ignore[no-untyped-call]
        wanted_total, head_gradient = 0.0, np.zeros((width, hidden_size))
        for i, one in enumerate(terms):
            h, w = hidden[i].detach().double().numpy(), lm_head.detach().double().numpy()
            cost, gradient = reference(logit_scale * h @ w.T)
            share = one.share.double().numpy()
            assert float(step_loss[i]) == pytest.approx((share * cost).sum(), abs=1e-4)
            wanted_total += one.weight * (share * cost).sum()
            gradient = gradient * (one.weight * logit_scale * share)[:, None]
            assert np.allclose(hidden[i].grad, gradient @ w, atol=1e-4)
            head_gradient += gradient.T @ h
        assert float(total.detach()) == pytest.approx(wanted_total, abs=1e-4)
        assert np.allclose(lm_head.grad, head_gradient, atol=1e-4)


def test_the_filter_takes_mass_from_what_the_target_would_not_say() -> None:
    """p: 0.6, 0.3, 0.1. With k = 2 it is 2/3, 1/3, 0, and a draft that says the third token is pushed off it."""
    target = torch.tensor([[0.6, 0.3, 0.1]]).log()
    filtered = Forward(2).aim(target)
    assert filtered[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    logits = torch.tensor([[0.0, 0.0, 9.0]])
    Forward(2).cost_(logits, torch.tensor([2]), filtered, None)
    assert float(logits[0, 2]) > 0.99
    for k in (0, 3, 50):
        assert torch.equal(Forward(k).aim(target), target.softmax(-1))


# --- whole trajectories ---


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sizes, int]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    sizes = Sizes(
        lengths=lengths,
        prompts=[draw(st.integers(0, n)) for n in lengths],
        kv_heads=draw(st.integers(1, 2)),
        draft_vocab=draw(st.integers(3, 19)),
        ttt=draw(st.integers(1, 5)),
        start=draw(st.sampled_from([0, 13])),
    )
    return sizes, draw(st.integers(0, 9999))


def assert_is_the_reference(case: Case, sizes: Sizes, objective: Objective, prompt_weight: float = 0) -> LossOutput:
    output = ttt_loss(*case, sizes.ttt, prompt_weight=prompt_weight, objective=objective)
    wanted = reference_objective(*in_float64(*case), sizes.ttt, objective, prompt_weight)
    assert output.discard_rows.tolist() == wanted.discard_rows
    assert output.step_loss.tolist() == pytest.approx(wanted.step_loss, rel=1e-3, abs=5e-4)
    assert output.discard_loss.tolist() == pytest.approx(wanted.discard_loss, rel=1e-3, abs=5e-4)
    assert float(output.total.detach()) == pytest.approx(wanted.total, rel=1e-3, abs=1e-3)
    return output


def slope(case: Case, sizes: Sizes, objective: Objective, direction: dict[str, torch.Tensor]) -> float:
    """Derivative of numpy's total along a direction in the draft's weights, by finite differences."""
    totals = []
    for step in (1e-6, -1e-6):
        draft, head, batch = in_float64(*case)
        for name, parameter in draft.named_parameters():
            if name in direction:
                parameter.data += step * direction[name].double()
        totals.append(reference_objective(draft, head, batch, sizes.ttt, objective).total)
    return (totals[0] - totals[1]) / 2e-6


@settings(max_examples=60)
@given(
    case=cases(),
    direction=st.sampled_from(DIRECTIONS),
    weight=st.sampled_from([0.0, 0.1, 1.0]),
    k=st.sampled_from([0, 1, 4, 10]),
    prompt_weight=st.sampled_from([0.0, 0.3]),
)
def test_every_member_is_the_reference(
    case: tuple[Sizes, int], direction: Direction, weight: float, k: int, prompt_weight: float
) -> None:
    sizes, seed = case
    assert_is_the_reference(with_branches(sizes, seed), sizes, Objective(direction, weight, k), prompt_weight)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("k", [0, 4])
def test_every_gradient_is_the_references_slope(direction: Direction, weight: float, k: int) -> None:
    sizes, objective = Sizes([9, 6, 8], [3, 2, 5], draft_vocab=15, ttt=4), Objective(direction, weight, k)
    case = with_branches(sizes, 57)
    for parameter in case[0].parameters():  # as tame as a trained draft: differences of float32 gradients are small
        parameter.data *= 1.0 if parameter.dim() == 1 else 0.6
    output = assert_is_the_reference(case, sizes, objective)
    assert (int(output.discard_rows.sum()) > 8) == (weight > 0)
    generator = torch.Generator().manual_seed(1)
    for name, gradient in gradients(case[0], output.total).items():
        along = torch.randn(gradient.shape, generator=generator)
        wanted = slope(case, sizes, objective, {name: along})
        assert float((gradient * along).sum()) == pytest.approx(wanted, rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"norm_before_residual": True},
        {"fc_norm": True},
        {"norm_output": True},
        {"attention_bias": True, "mlp_bias": True},
        {"logit_scale": 0.5},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_branches_of_every_kind_of_draft(options: dict[str, Any]) -> None:
    sizes = Sizes([9, 5, 7], [3, 1, 6], draft_vocab=19, ttt=4)
    output = assert_is_the_reference(with_branches(sizes, 5, **options), sizes, Objective("forward", 1.0, 3))
    assert output.discard_rows.sum() > 5


def test_blocks_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 2)
    monkeypatch.setattr(divergence, "CHUNK", 3)
    sizes = Sizes([17, 5, 11], [6, 0, 2], ttt=4)
    for direction in DIRECTIONS:
        assert_is_the_reference(with_branches(sizes, 8), sizes, Objective(direction, 0.5, 3))


def test_bfloat16_products_change_little() -> None:
    draft, head, batch = with_branches(Sizes([40, 25], [3, 1], hidden=32, head_dim=8, vocab=64, draft_vocab=48), 3)
    for parameter in draft.parameters():  # as tame as a trained draft, or attention is a lottery
        parameter.data *= 1.0 if parameter.dim() == 1 else 0.3
    for direction in DIRECTIONS:
        exact, rough = (
            ttt_loss(draft, head, batch, 3, matmul_dtype=d, objective=Objective(direction, 1.0))
            for d in (torch.float32, torch.bfloat16)
        )
        assert not torch.equal(exact.discard_loss, rough.discard_loss)  # it is used
        assert rough.step_loss.tolist() == pytest.approx(exact.step_loss.tolist(), rel=0.03)
        assert rough.discard_loss.tolist() == pytest.approx(exact.discard_loss.tolist(), rel=0.03)
        wanted, found = gradients(draft, exact.total), gradients(draft, rough.total)
        for name, gradient in wanted.items():
            assert float((found[name] - gradient).norm()) < 0.05 * float(gradient.norm()), name


# --- settings ---


def test_without_a_weight_branches_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, head, batch = with_branches(Sizes([9, 8], [2, 2]), 1)
    monkeypatch.setattr("aurora_vllm.learner.loss.find_chains", None)
    assert ttt_loss(draft, head, batch, 3).discard_rows.tolist() == [0, 0, 0]
    with pytest.raises(TypeError):
        ttt_loss(draft, head, batch, 3, objective=Objective("forward", 0.1))


def test_next_tokens_must_be_known() -> None:
    draft, head, batch = random_case(Sizes([6], [2]))
    with pytest.raises(ValueError, match="emitted"):
        ttt_loss(draft, head, batch, 2, objective=Objective("reverse+next-token"))


def test_the_discard_term_is_learned_with_branches_alone() -> None:
    draft, head, batch = with_branches(Sizes([12, 9], [3, 2], hidden=16, head_dim=8, vocab=40, draft_vocab=30), 2)
    batch.loss_mask[:] = False
    trainer = Trainer(draft, head, 1e-2, 3, objective=Objective("forward", 1.0, 1))
    outputs = [trainer.step(batch) for _ in range(40)]
    assert (trainer.steps, trainer.empty) == (40, 0)
    assert float(outputs[-1].discard_loss.sum()) < 0.2 * float(outputs[0].discard_loss.sum())


def test_a_discard_term_that_no_step_reaches_is_refused() -> None:
    AuroraConfig(ttt_length=2, discard_weight=0.1)
    AuroraConfig(ttt_length=1)
    with pytest.raises(ValueError, match="ttt_length"):
        AuroraConfig(ttt_length=1, discard_weight=0.1)
