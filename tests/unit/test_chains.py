"""Which draft state, and which step, a rejected branch's row is about."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.batch import Batch, collate
from aurora_vllm.learner.branches import find_chains
from aurora_vllm.learner.loss import draft_choices, ttt_loss
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.trajectory import Branch
from aurora_vllm.transport.rows import Field, RowFlag
from tests.unit.engine_history import LAYOUT, engine, new_request, pack
from tests.unit.naive_eagle3 import Sizes, random_case
from tests.unit.reference_objective import gradients, spliced, with_branches


def path_as_branch(batch: Batch, row: int, accepted: int, rows: int) -> Branch:
    """The path's own rows from ``row`` on, as if they had been rejected."""
    taken = slice(row, row + rows)
    position = int(batch.positions[0, row])
    return Branch(position, accepted, batch.input_ids[0, taken], batch.last[0, taken])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"])
@pytest.mark.parametrize("start", [0, 13])
@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_a_branch_of_the_paths_own_tokens_costs_what_the_path_does(
    accepted: int, start: int, architecture: str
) -> None:
    """Branch row n behind ``accepted`` drafts is path row P+n at step accepted+1+n: same loss, same gradient."""
    sizes, row, rows = Sizes([12], [2], vocab=11, draft_vocab=11, ttt=5, start=start), 6, 4
    draft, head, batch = random_case(sizes, 3, architectures=[architecture])
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
        believed = Branch(certain + 1, 0, torch.tensor([*drafts, 0]), torch.zeros(step + 1, 6))
        choices = draft_choices(draft, head, spliced(batch, 0, believed), 4, torch.ones(1, certain + 2 + step) > 0)
        drafts.append(int(choices[step, 0, root]))
    assert drafts[0] == int(draft_choices(draft, head, batch, 1, batch.attention_mask)[0, 0, root])
    # A target that is certain of each draft's successor: only a draft state that proposed just that costs nothing.
    head.lm_head = torch.nn.functional.normalize(head.lm_head, dim=-1)
    last = 60 * head.lm_head[drafts[1:]]
    batch.branches = [[Branch(certain + 1, 0, torch.tensor(drafts[:3]), last)]]
    chains = find_chains(batch, 4)
    assert (int(chains.root), int(chains.leaves), chains.tokens.tolist()) == (root, 1, [[0, *drafts[:3]]])
    with torch.no_grad():
        draft.lm_head.weight *= 100  # all but certain of its first choice, whatever that is
    output = ttt_loss(draft, head, batch, 4, objective=Objective("forward", 1.0, 1))
    assert output.discard_rows.tolist() == [0, 1, 1, 1]
    assert output.discard_loss.max() < 0.1


@settings(max_examples=60)
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
    tokens, last = torch.tensor([1, 2, 3]), torch.randn(3, 6)

    def rows(position: int, accepted: int, n: int = 3) -> list[int]:
        batch.branches = [[Branch(position, accepted, tokens[:n], last[:n])]]
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
