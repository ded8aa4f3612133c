"""The objective against a naive one, against recorded numbers of Aurora's release, and what its settings mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner import attention, divergence, target
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.loss import Semantics, draft_choices, ttt_loss
from tests.unit.naive_eagle3 import Sizes, naive_loss, random_case


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    draft_vocab = draw(st.integers(1, 19))
    return Sizes(
        lengths=lengths,
        prompts=[draw(st.integers(0, n)) for n in lengths],
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 4])),
        draft_vocab=draft_vocab,
        ttt=draw(st.integers(1, 4)),
        start=draw(st.sampled_from([0, 13])),
    )


def gradients(draft: Eagle3Draft, total: torch.Tensor) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    if total.requires_grad:
        total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


def assert_same_as_naive(
    case: Sizes, seed: int, semantics: Semantics, prompt_weight: float = 0, **options: Any
) -> None:
    draft, head, batch = random_case(case, seed, **options)
    total, losses, accuracies = naive_loss(draft, head, batch, case.ttt, semantics, prompt_weight)
    wanted = gradients(draft, total)
    output = ttt_loss(draft, head, batch, case.ttt, semantics, prompt_weight)
    found = gradients(draft, output.total)
    assert output.step_loss.tolist() == pytest.approx(losses, abs=2e-4)
    assert output.step_accuracy.tolist() == pytest.approx(accuracies, abs=1e-6)
    assert float(output.total.detach()) == pytest.approx(float(total.detach()), abs=5e-4)
    for name, gradient in wanted.items():
        difference = float((found[name] - gradient).abs().max())
        assert difference <= 5e-4 + 2e-3 * float(gradient.abs().max()), name


@settings(max_examples=60)
@given(sizes(), st.integers(0, 1000), st.sampled_from(["default", "aurora-release"]))
def test_equals_the_naive_objective(case: Sizes, seed: int, semantics: Semantics) -> None:
    assert_same_as_naive(case, seed, semantics)


@settings(max_examples=15)
@given(sizes(), st.integers(0, 1000), st.sampled_from([0.1, 1.0]))
def test_prompt_rows_can_have_a_weight(case: Sizes, seed: int, prompt_weight: float) -> None:
    assert_same_as_naive(case, seed, "default", prompt_weight)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"norm_output": True},
        {"attention_bias": True, "mlp_bias": True},
        {"architectures": ["Eagle3Qwen3ForCausalLM"]},
        {"logit_scale": 0.5},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_equals_the_naive_objective_for_every_kind_of_draft(options: dict[str, Any]) -> None:
    assert_same_as_naive(Sizes([9, 5, 7], [3, 1, 7]), 3, "default", **options)


def test_blocks_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", 3)
    monkeypatch.setattr(divergence, "CHUNK", 4)
    monkeypatch.setattr(target, "_VOCABULARY_CHUNK", 5)
    for semantics in ("default", "aurora-release"):
        assert_same_as_naive(Sizes([17, 5, 11], [6, 0, 2]), 5, semantics)


def test_bfloat16_products_change_little() -> None:
    case = Sizes([40, 25], [3, 1], hidden=32, head_dim=8, vocab=64, draft_vocab=48)
    draft, head, batch = random_case(case)
    for parameter in draft.parameters():  # as tame as a trained draft, or attention is a lottery
        parameter.data *= 1.0 if parameter.dim() == 1 else 0.3
    exact, rough = (ttt_loss(draft, head, batch, 3, matmul_dtype=d) for d in (torch.float32, torch.bfloat16))
    assert not torch.equal(exact.step_loss, rough.step_loss)  # it is used
    assert rough.step_loss.tolist() == pytest.approx(exact.step_loss.tolist(), rel=0.02)
    wanted, found = gradients(draft, exact.total), gradients(draft, rough.total)
    for name, gradient in wanted.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - gradient).norm()) < 0.05 * float(gradient.norm()), name


def test_a_known_argmax_gives_the_same_loss() -> None:
    draft, head, batch = random_case(Sizes([9, 6], [3, 2]))
    without = ttt_loss(draft, head, batch, 3)
    batch.target_argmax = (batch.last @ head.lm_head.T).argmax(-1)
    batch.target_argmax[0, ::2] = -1  # known here, unknown there
    assert torch.equal(ttt_loss(draft, head, batch, 3).step_loss, without.step_loss)


def test_the_release_does_not_train_the_first_draft_and_trains_on_padding() -> None:
    """Rows 0..5, step 0. Prompt of 4: our target rows are j = 4, 5; the release's 5 and 6, which does not exist."""
    draft, head, batch = random_case(Sizes([6, 9], [4, 9], vocab=11, draft_vocab=11, ttt=1))

    def loss(semantics: Semantics) -> float:
        output = ttt_loss(draft, head, batch, 1, semantics)
        assert output.step_rows.tolist() == [int(batch.loss_mask[0].sum())]
        return float(output.step_loss[0])

    ours, theirs = loss("default"), loss("aurora-release")
    batch.last[0, 4] += 1.0  # what the first draft after prefill should predict
    assert loss("default") != ours and loss("aurora-release") == theirs
    batch.loss_mask[0, 4] = False  # a prompt of 5: all that the release trains on is the row behind the end
    theirs = loss("aurora-release")
    batch.last[0, :6] = torch.randn(6, 6)
    assert loss("aurora-release") == theirs


def test_the_release_has_no_prompt_weight() -> None:
    draft, head, batch = random_case(Sizes([6], [4]))
    with pytest.raises(ValueError, match="prompt"):
        ttt_loss(draft, head, batch, 1, "aurora-release", prompt_weight=0.5)


def test_without_a_row_to_learn_from_the_loss_is_zero() -> None:
    draft, head, batch = random_case(Sizes([4, 1], [4, 0]))
    output = ttt_loss(draft, head, batch, 2)
    assert (
        float(output.total.detach()) == 0
        and output.step_rows.tolist() == [0, 0]
        and output.step_accuracy.tolist() == [0, 0]
    )


def test_accuracy_is_what_a_verifier_would_find() -> None:
    """step_accuracy, from training, and draft_choices, from scoring, are two ways to the same verdicts."""
    case = Sizes([9, 6], [3, 2], ttt=3)
    draft, head, batch = random_case(case, 8)
    output = ttt_loss(draft, head, batch, 3)
    choices = draft_choices(draft, head, batch, 3, batch.attention_mask)
    first_choice = (batch.last @ head.lm_head.T).argmax(-1)
    for i in range(3):
        verdicts = []
        for b, (length, prompt) in enumerate(zip(case.lengths, case.prompts, strict=True)):
            for t in range(9):
                j = t + 1 + i
                assert (choices[i, b, t] >= 0) == (j < length and t < length)
                if prompt <= j < length and first_choice[b, j] in draft.target_ids:
                    verdicts.append(bool(choices[i, b, t] == first_choice[b, j]))
        assert output.step_rows[i] == len(verdicts)
        assert float(output.step_accuracy[i]) == pytest.approx(sum(verdicts) / len(verdicts))
    assert 0 < output.step_accuracy.sum() < 3


def test_more_steps_than_rows() -> None:
    draft, head, batch = random_case(Sizes([2], [0], ttt=4))
    assert ttt_loss(draft, head, batch, 4).step_rows.shape == (4,)
    choices = draft_choices(draft, head, batch, 4, batch.attention_mask)
    assert (choices >= 0).nonzero().tolist() == [[0, 0, 0]]


def test_choices_are_asked_only_where_wanted() -> None:
    draft, head, batch = random_case(Sizes([9, 6], [3, 2]), 8)
    everywhere = draft_choices(draft, head, batch, 3, batch.attention_mask)
    rows = torch.zeros_like(batch.attention_mask)
    rows[0, 4], rows[1, 1] = True, True
    some = draft_choices(draft, head, batch, 3, rows)
    assert torch.equal(some, torch.where(rows, everywhere, -1))
    assert (some[:, 0, 4] >= 0).all()
