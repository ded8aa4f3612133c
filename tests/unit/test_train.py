"""The trainer: what it changes, what it leaves alone, when it does nothing."""

from __future__ import annotations

import pytest
import torch

from aurora_vllm.learner.train import (
    BODY_RATE,
    HEAD_STEPS,
    REFINE_WARMUP_STEPS,
    Trainer,
    fast_matmul_dtype,
)
from tests.unit.naive_eagle3 import Sizes, random_case

SIZES = Sizes([12, 9], [3, 2], hidden=16, head_dim=8, vocab=40, draft_vocab=30)


def test_learns_a_batch_by_heart_and_changes_only_the_draft() -> None:
    draft, head, batch = random_case(SIZES)
    frozen = [t.clone() for t in (head.embed_tokens, head.lm_head, draft.d2t, draft.frequencies)]
    # In float32: this target is nearly undecided, and its first choice would hang on rounding.
    trainer = Trainer(draft, head, learning_rate=1e-2, ttt_length=3, matmul_dtype=torch.float32)
    outputs = [trainer.step(batch) for _ in range(60)]
    assert float(outputs[-1].total) < 0.6 * float(outputs[0].total)
    assert float(outputs[-1].step_accuracy.min()) > 0.8 > float(outputs[0].step_accuracy.max())
    assert not outputs[0].total.requires_grad
    for before, after in zip(frozen, (head.embed_tokens, head.lm_head, draft.d2t, draft.frequencies), strict=True):
        assert torch.equal(before, after)
    assert (trainer.steps, trainer.skipped, trainer.empty) == (60, 0, 0)


def test_warm_up_is_linear_and_bounds_the_first_step() -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, learning_rate=1e-3, ttt_length=1, warmup_steps=4)
    before, rates = draft.fc.weight.detach().clone(), []
    for n in range(6):
        trainer.step(batch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        if n == 0:  # Adam's first step moves every weight by the learning rate
            assert float((draft.fc.weight - before).abs().max().detach()) == pytest.approx(0.25e-3, rel=0.01)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_refined_draft_begins_without_the_moments_of_the_one_before() -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, learning_rate=1e-2, ttt_length=1)
    for _ in range(20):
        trainer.step(batch)
    trainer.refine()
    before = draft.lm_head.weight.detach().clone()
    trainer.step(batch)
    moved = float((draft.lm_head.weight - before).abs().max().detach())
    assert moved == pytest.approx(trainer.optimizer.param_groups[1]["lr"], rel=0.01)  # as Adam's first step does


def test_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, 1e-3, ttt_length=2, max_grad_norm=0.01)
    seen: list[float] = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda: seen.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in draft.parameters() if p.grad is not None]))
        ),
    )
    trainer.step(batch)
    assert seen == pytest.approx([0.01], rel=1e-4)


@pytest.mark.parametrize("where", ["aux", "last", "weights"])
def test_what_is_not_finite_changes_nothing(where: str) -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, 1e-3, ttt_length=2)
    trainer.step(batch)
    if where == "weights":
        draft.fc.weight.data[0, 0] = torch.inf
    else:
        getattr(batch, where)[0, 5] = torch.nan
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    trainer.step(batch)
    assert (trainer.steps, trainer.skipped) == (1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


def test_a_loss_that_is_finite_with_a_gradient_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, 1e-3, ttt_length=2)
    before = draft.fc.weight.detach().clone()
    draft.fc.weight.register_hook(lambda grad: grad * torch.nan)
    trainer.step(batch)
    assert trainer.skipped == 1 and torch.equal(draft.fc.weight, before)


def test_nothing_to_learn_from_is_no_step() -> None:
    draft, head, batch = random_case(SIZES)
    batch.loss_mask[:] = False
    trainer = Trainer(draft, head, 1e-3, ttt_length=2)
    trainer.step(batch)
    assert (trainer.steps, trainer.skipped, trainer.empty) == (0, 0, 1)


@pytest.mark.parametrize(("has", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)])
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    draft, head, _ = random_case(SIZES)
    assert fast_matmul_dtype(torch.device("cpu")) == dtype
    assert Trainer(draft, head, 1e-3, ttt_length=1).matmul_dtype == dtype
    assert Trainer(draft, head, 1e-3, ttt_length=1, matmul_dtype=torch.float32).matmul_dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in draft.parameters())
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # not in every torch
    assert fast_matmul_dtype(torch.device("cpu")) == torch.float32


def test_refining_begins_with_the_head_alone_and_goes_on_gently() -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, learning_rate=1e-3, ttt_length=2)
    trainer.step(batch)
    trainer.refine()
    body = {name: p.detach().clone() for name, p in draft.named_parameters() if name != "lm_head.weight"}
    before = draft.lm_head.weight.detach().clone()
    for _ in range(HEAD_STEPS):
        trainer.step(batch)
    assert all(torch.equal(p, body[name]) for name, p in draft.named_parameters() if name in body)
    assert not torch.equal(draft.lm_head.weight, before)
    trainer.step(batch)
    moved = max(float((p - body[name]).detach().abs().max()) for name, p in draft.named_parameters() if name in body)
    assert 0 < moved <= 1.05 * 1e-3 * BODY_RATE / REFINE_WARMUP_STEPS  # AdamW's first step is as long as its rate
    assert not torch.equal(draft.fc.weight, body["fc.weight"])


def test_the_optimizer_goes_on_exactly_from_its_saved_state() -> None:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, 1e-2, ttt_length=2, warmup_steps=5)
    for _ in range(3):
        trainer.step(batch)
    other, _, _ = random_case(SIZES, seed=1)
    again = Trainer(other, head, 1e-2, ttt_length=2, warmup_steps=5)
    with pytest.raises(ValueError, match=r"fc\.weight\.exp_avg \[3\] fits no tensor"):
        again.load_state_tensors({"fc.weight.exp_avg": torch.zeros(3)}, 9, None)
    assert not again.optimizer.state and again.steps == 0
    other.load_state_dict(draft.state_dict())
    again.load_state_tensors(
        {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}, trainer.steps, None
    )
    for _ in range(3):  # inside the warm-up, so the count matters too
        trainer.step(batch)
        again.step(batch)
    assert all(torch.equal(tensor, draft.state_dict()[name]) for name, tensor in other.state_dict().items())
