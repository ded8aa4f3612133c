"""The family of objectives against numpy: rows, gradients, and which draft state a branch's row is about."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner import attention, divergence
from aurora_vllm.learner.batch import Batch, collate
from aurora_vllm.learner.branches import find_chains
from aurora_vllm.learner.divergence import Terms
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.loss import LossOutput, draft_choices, ttt_loss
from aurora_vllm.learner.objective import Direction, Forward, Objective, Reverse
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Assembler, Branch
from aurora_vllm.transport.rows import Field, RowFlag
from tests.unit.engine_history import LAYOUT, engine, new_request, pack
from tests.unit.naive_eagle3 import Sizes, random_case
from tests.unit.reference_objective import (
    accepted_cost,
    forward_cost,
    in_float64,
    reference_objective,
    reverse_cost,
    spliced,
)

DIRECTIONS = get_args(Direction)
Case = tuple[Eagle3Draft, TargetHead, Batch]


# --- one row ---


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


def with_branches(sizes: Sizes, seed: int, **options: Any) -> Case:
    """Random branches: at any row up to behind the last, none in some sequences, cut short, or with no root there."""
    draft, head, batch = random_case(sizes, seed, **options)
    rng = np.random.default_rng(seed)
    batch.emitted = torch.from_numpy(rng.integers(-1, sizes.vocab, batch.input_ids.shape))
    batch.branches = [
        [
            Branch(
                position=sizes.start + int(rng.integers(1, length + 1)),
                accepted=int(rng.integers(0, 4)),
                token_ids=torch.from_numpy(rng.integers(0, sizes.vocab, rows)),
                aux=torch.zeros(rows, 3 * sizes.hidden),
                last=torch.from_numpy(rng.normal(size=(rows, sizes.hidden))).float(),
            )
            for rows in rng.integers(1, 5, rng.integers(0, 4))
        ]
        for length in sizes.lengths
    ]
    return draft, head, batch


def gradients(draft: Eagle3Draft, total: torch.Tensor) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in draft.named_parameters()}


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


@settings(max_examples=60, deadline=None)
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


# --- which row is which ---


def path_as_branch(batch: Batch, row: int, accepted: int, rows: int) -> Branch:
    """The path's own rows from ``row`` on, as if they had been rejected."""
    taken = slice(row, row + rows)
    position = int(batch.positions[0, row])
    return Branch(position, accepted, batch.input_ids[0, taken], batch.aux[0, taken], batch.last[0, taken])


@pytest.mark.parametrize("start", [0, 13])
@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_a_branch_of_the_paths_own_tokens_costs_what_the_path_does(accepted: int, start: int) -> None:
    """Branch row n behind ``accepted`` drafts is path row P+n at step accepted+1+n: same loss, same gradient."""
    sizes, row, rows = Sizes([12], [2], vocab=11, draft_vocab=11, ttt=5, start=start), 6, 4
    draft, head, batch = random_case(sizes, 3)
    batch.branches = [[path_as_branch(batch, row, accepted, rows)]]
    nothing = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    found = ttt_loss(draft, head, nothing, 5, objective=Objective("forward", 1.0, 0))
    steps = range(accepted + 1, 5)
    assert found.discard_rows.tolist() == [int(i in steps) for i in range(5)]
    assert found.step_rows.tolist() == [0] * 5
    discard = gradients(draft, found.total)
    summed = {name: torch.zeros_like(gradient) for name, gradient in discard.items()}
    for n, step in enumerate(steps):
        # The path's loss of target row P+n alone, and only at this step.
        only = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
        only.loss_mask[0, row + n] = True
        before, upto = (ttt_loss(draft, head, only, k) for k in (step, step + 1))
        assert float(found.discard_loss[step]) == pytest.approx(float(upto.step_loss[step]), abs=1e-4)
        more, less = gradients(draft, upto.total), gradients(draft, before.total)
        for name in summed:
            summed[name] += more[name] - less[name]
    for name, gradient in discard.items():
        assert torch.allclose(gradient, summed[name], atol=2e-3, rtol=2e-3), name


def test_a_chain_begins_where_the_servers_drafts_did() -> None:
    """A server's drafts, made greedily on the path, are exactly the tokens the unroll proposes at path and branch."""
    sizes = Sizes([12], [2], ttt=4, vocab=300, draft_vocab=300)
    draft, head, batch = random_case(sizes, 4)
    certain, root = 7, 6  # the verification's last certain row; drafts were made behind the row before it
    drafts: list[int] = []
    for step in range(4):  # the sequence as the draft believed it, one token longer at each step
        believed = Branch(certain + 1, 0, torch.tensor([*drafts, 0]), batch.aux[0, :0], torch.zeros(step + 1, 6))
        choices = draft_choices(draft, head, spliced(batch, 0, believed), 4, torch.ones(1, certain + 2 + step) > 0)
        drafts.append(int(choices[step, 0, root]))
    assert drafts[0] == int(draft_choices(draft, head, batch, 1, batch.attention_mask)[0, 0, root])
    # A target that is certain of each draft's successor: only a draft state that proposed just that costs nothing.
    head.lm_head = torch.nn.functional.normalize(head.lm_head, dim=-1)
    last = 60 * head.lm_head[drafts[1:]]
    batch.branches = [[Branch(certain + 1, 0, torch.tensor(drafts[:3]), batch.aux[0, :3], last)]]
    chains = find_chains(batch, 4)
    assert (int(chains.root), int(chains.leaves), chains.tokens.tolist()) == (root, 1, [[0, *drafts[:3]]])
    with torch.no_grad():
        draft.lm_head.weight *= 100  # all but certain of its first choice, whatever that is
    output = ttt_loss(draft, head, batch, 4, objective=Objective("forward", 1.0, 1))
    assert output.discard_rows.tolist() == [0, 1, 1, 1]
    assert output.discard_loss.max() < 0.1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(5, 60))
def test_from_the_rows_of_a_step_to_the_chain_that_made_its_drafts(seed: int, steps: int) -> None:
    """The row before a step's drafts is the last certain token; the chain's first step read it, one row earlier."""
    rng = random.Random(seed)
    requests = [new_request(rng.getrandbits(62), rng) for _ in range(3)]
    rows = [row for _, new, _ in engine(requests, rng, steps) for row in new]
    rows += [one.end(steps + 1) for one in requests if not one.ended]
    trajectories = Assembler(LAYOUT).feed(pack(rows))
    if not trajectories:
        return
    batch, wanted = collate(trajectories), set()
    for b, one in enumerate(trajectories):
        of_request = [r for r in rows if r[Field.REQUEST_LOW] | r[Field.REQUEST_HIGH] << 31 == one.request]
        for first in (r for r in of_request if r[Field.FLAGS] & RowFlag.REJECTED):
            before = [r for r in of_request if r[Field.STEP] == first[Field.STEP] and not r[Field.FLAGS]]
            certain = next(r[Field.POSITION] for r in before if r[Field.DRAFT_INDEX] == -1)
            root, leaves = certain - 1 - one.start, len(before)
            if first[Field.POSITION] == before[-1][Field.POSITION] + 1 and root >= 0 and leaves < 4:
                wanted.add((b, root, leaves, first[Field.TOKEN]))
    chains = find_chains(batch, 4)
    tokens = chains.tokens.gather(1, chains.leaves.unsqueeze(1)).squeeze(1)
    found = zip(*(x.tolist() for x in (chains.sequence, chains.root, chains.leaves, tokens)), strict=True)
    assert set(found) == wanted


def test_what_no_chain_reaches_is_left_out() -> None:
    draft, head, batch = with_branches(Sizes([9], [2], start=5, ttt=3), 0)
    tokens, aux, last = torch.tensor([1, 2, 3]), torch.zeros(3, 18), torch.randn(3, 6)

    def rows(position: int, accepted: int, n: int = 3) -> list[int]:
        batch.branches = [[Branch(position, accepted, tokens[:n], aux[:n], last[:n])]]
        return find_chains(batch, 3).step.tolist()

    assert rows(7, 0) == [1, 2]  # root is row 0
    assert rows(6, 0) == []  # the root lies before the first row
    assert rows(7, 1) == []
    assert rows(9, 1) == [2]
    assert rows(9, 2) == []  # all three steps are on the path
    assert rows(14, 0) == [1, 2]  # behind the last row
    assert rows(9, 0, 1) == [1]  # cut: the target's verdict on the second draft is not known
    batch.branches = []
    output = ttt_loss(draft, head, batch, 3, objective=Objective("forward", 1.0))
    plain = ttt_loss(draft, head, batch, 3)
    assert torch.equal(output.total, plain.total) and output.discard_loss.tolist() == output.discard_rows.tolist()


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
