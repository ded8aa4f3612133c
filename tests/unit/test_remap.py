"""A draft moved to another vocabulary: every token finds its row and its moments where it went."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner import remap
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import simulate
from aurora_vllm.learner.remap import plan_move
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from tests.unit.naive_eagle3 import Sizes, naive_loss, random_case
from tests.unit.test_lesson import day0_draft

SIZES = Sizes([9, 7], [3, 2], vocab=30, draft_vocab=11)
VOCABULARIES = st.permutations(range(SIZES.vocab)).map(lambda ids: torch.tensor(sorted(ids[: SIZES.draft_vocab])))


def move_to_vocabulary(*arguments: Any) -> int:
    return plan_move(*arguments)()


def trained(steps: int = 2) -> tuple[Trainer, TargetHead]:
    draft, head, batch = random_case(SIZES)
    trainer = Trainer(draft, head, 1e-2, ttt_length=2, matmul_dtype=torch.float32)
    for _ in range(steps):
        trainer.step(batch)
    return trainer, head


def by_token(draft: Eagle3Draft, rows: torch.Tensor) -> dict[int, torch.Tensor]:
    return dict(zip(draft.target_ids.tolist(), rows.detach().clone(), strict=True))


@settings(max_examples=50)
@given(VOCABULARIES)
def test_rows_and_moments_follow_their_token(ids: torch.Tensor) -> None:
    trainer, head = trained()
    draft, weight = trainer.draft, trainer.draft.lm_head.weight
    state = trainer.optimizer.state[weight]
    before = {name: by_token(draft, rows) for name, rows in [("row", weight), *state.items()] if rows.dim() == 2}
    others = {name: t.clone() for name, t in draft.state_dict().items() if name not in ("lm_head.weight", "d2t")}
    displacement = torch.stack([before["row"][t] - head.lm_head[t] for t in before["row"]]).mean(0)
    addresses = [t.data_ptr() for t in (weight, draft.d2t, state["exp_avg"], state["exp_avg_sq"])]

    new = move_to_vocabulary(draft, head, ids, trainer.optimizer)

    assert set(before) == {"row", "exp_avg", "exp_avg_sq"}
    assert torch.equal(draft.target_ids, ids) and draft.d2t.shape == (SIZES.draft_vocab,)
    after = {name: by_token(draft, rows) for name, rows in [("row", weight), *state.items()] if rows.dim() == 2}
    fresh = set(ids.tolist()) - set(before["row"])
    assert new == len(fresh)
    for token in ids.tolist():
        if token in fresh:
            torch.testing.assert_close(after["row"][token], head.lm_head[token] + displacement)
            assert not after["exp_avg"][token].any() and not after["exp_avg_sq"][token].any()
        else:
            assert all(torch.equal(after[name][token], before[name][token]) for name in before)
    assert all(torch.equal(t, draft.state_dict()[name]) for name, t in others.items())
    assert addresses == [t.data_ptr() for t in (weight, draft.d2t, state["exp_avg"], state["exp_avg_sq"])]


@pytest.mark.parametrize("rows_for_turn", [2, 9])
def test_a_new_row_goes_where_the_others_went(monkeypatch: pytest.MonkeyPatch, rows_for_turn: int) -> None:
    """A lesson turns lm_head; the target's row as it is would read nothing of the draft's states."""
    monkeypatch.setattr(remap, "ROWS_FOR_TURN", rows_for_turn)
    draft, head = day0_draft()
    turn = torch.randn(draft.lm_head.weight.shape[1], draft.lm_head.weight.shape[1])
    with torch.no_grad():
        draft.lm_head.weight.copy_(draft.lm_head.weight @ turn + torch.randn(len(turn)))
    expected = (head.lm_head[-1] - head.lm_head[:-1].mean(0)) @ turn + draft.lm_head.weight.detach().mean(0)
    assert move_to_vocabulary(draft, head, torch.arange(1, len(head.lm_head))) == 1
    similarity = F.cosine_similarity(draft.lm_head.weight.detach()[-1], expected, dim=0)
    assert float(similarity) > 0.99 if rows_for_turn == 2 else float(similarity) < 0.5


def test_there_and_back_again_changes_nothing_for_tokens_that_stayed() -> None:
    trainer, head = trained()
    draft = trainer.draft
    first = draft.target_ids.clone()
    untouched = copy.deepcopy(draft.state_dict())
    other = first.clone()
    missing = next(token for token in range(SIZES.vocab) if token not in first.tolist())
    other[4] = missing
    assert move_to_vocabulary(draft, head, other.sort().values, trainer.optimizer) == 1
    assert move_to_vocabulary(draft, head, first, trainer.optimizer) == 1
    stayed = torch.arange(len(first)) != 4
    assert torch.equal(draft.lm_head.weight[stayed], untouched["lm_head.weight"][stayed])
    assert torch.equal(draft.d2t, untouched["d2t"])


def test_a_draft_after_a_move_trains_towards_the_target_on_its_new_vocabulary() -> None:
    """The objective sees the new vocabulary: target rows, membership and the head's rows belong together."""
    trainer, head = trained()
    _, _, batch = random_case(SIZES)
    ids = torch.arange(SIZES.vocab - SIZES.draft_vocab, SIZES.vocab)
    move_to_vocabulary(trainer.draft, head, ids, trainer.optimizer)
    wanted = naive_loss(trainer.draft, head, batch, 2)[1]
    found = trainer.step(batch)
    torch.testing.assert_close(found.step_loss, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    losses = [float(trainer.step(batch).total) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_scoring_a_draft_with_another_vocabulary_leaves_the_trainers_rows_in_place() -> None:
    """Incumbent and candidate may differ for a while; only training asks for the target's rows, so one entry does."""
    trainer, head = trained()
    incumbent = copy.deepcopy(trainer.draft)
    move_to_vocabulary(trainer.draft, head, torch.arange(SIZES.draft_vocab), trainer.optimizer)
    _, _, batch = random_case(SIZES)
    trainer.step(batch)
    rows = head.rows(trainer.draft.target_ids)
    trajectory = Trajectory(1, 0, batch.input_ids[0], batch.aux[0], batch.last[0], 3, 1, 0.0)
    for draft in (incumbent, trainer.draft, incumbent):
        simulate(draft, head, trajectory, 2)
    assert head.rows(trainer.draft.target_ids) is rows
    torch.testing.assert_close(rows, F.embedding(trainer.draft.target_ids, head.lm_head))


@pytest.mark.parametrize("ids", [[1, 1, *range(2, 11)], range(10), range(20, 31), range(-1, 10)], ids=str)
def test_no_vocabulary_is_refused_and_nothing_changes(ids: list[int]) -> None:
    trainer, head = trained()
    before = {name: t.clone() for name, t in trainer.draft.state_dict().items()}
    with pytest.raises(ValueError, match="target ids"):
        move_to_vocabulary(trainer.draft, head, torch.tensor(list(ids)), trainer.optimizer)
    assert all(torch.equal(t, before[name]) for name, t in trainer.draft.state_dict().items())


def test_a_draft_of_another_width_starts_new_tokens_at_its_mean_row() -> None:
    draft, _, _ = random_case(SIZES)
    wide = TargetHead(torch.randn(SIZES.vocab, 2 * SIZES.hidden), torch.randn(SIZES.vocab, 2 * SIZES.hidden))
    mean = draft.lm_head.weight.detach().mean(0)
    before = set(draft.target_ids.tolist())
    move_to_vocabulary(draft, wide, torch.arange(SIZES.draft_vocab))
    new = next(i for i in range(SIZES.draft_vocab) if i not in before)
    torch.testing.assert_close(draft.lm_head.weight[new].detach(), mean)
