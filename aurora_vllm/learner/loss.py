"""Aurora's training objective over a training-time-test unroll.

``total = sum_i 0.8^i * (mean over target rows of the accepted path + lambda * mean over rows of rejected branches)``.
By default the accepted path's rows cost the forward KL, ``-sum_v p(v) log q_i(v)``; objective.py has the alternatives,
branches.py defines the discard term's rows. p is the target's distribution at temperature 1, restricted to and
renormalised on the draft vocabulary. Rows whose first choice in the full vocabulary lies outside it are left out,
because a draft could not propose it. Source: arXiv 2602.06932 and its release (models/eagle3.py, models/ops/loss.py),
which has only the accepted path's forward KL.

Which target rows j of the path count (see unroll.py for j):

    default          j in the completion. At step 0 this begins with the prompt's last row, from which the first token
                     after prefill is drafted.
    aurora-release   j-1 in the completion (its mask is not shifted): at step 0 that first token is not trained, and the
                     row after a sequence's end counts, whose target is uniform (softmax of padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.branches import Chains, find_chains, unroll_branches
from aurora_vllm.learner.divergence import Terms, divergence
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.unroll import UnrollPlan, plan_unroll, unroll

Semantics = Literal["default", "aurora-release"]
STEP_DECAY = 0.8  # weight of an unroll step relative to the one before


@dataclass(frozen=True)
class LossOutput:
    """The loss of a batch. Everything but ``total`` is detached."""

    total: torch.Tensor  # scalar, differentiable
    step_loss: torch.Tensor  # float32 [K], mean cost of each step's rows of the accepted path, nats
    step_accuracy: torch.Tensor  # float32 [K], share of a step's rows where draft and target agree on the first choice
    step_rows: torch.Tensor  # int64 [K], rows in each mean
    discard_loss: torch.Tensor  # float32 [K], like step_loss, for rejected branches; 0 without rows
    discard_rows: torch.Tensor  # int64 [K]

    @property
    def rows(self) -> int:
        """Number of loss terms."""
        return int(self.step_rows.sum() + self.discard_rows.sum())


def ttt_loss(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: Batch,
    ttt_length: int,
    semantics: Semantics = "default",
    prompt_weight: float = 0.0,
    matmul_dtype: torch.dtype = torch.float32,
    objective: Objective | None = None,
) -> LossOutput:
    """The training objective for one batch.

    Args:
        draft: the draft in training.
        head: the target's embedding and lm_head.
        batch: B trajectories of at most T rows.
        ttt_length: K, unroll steps.
        semantics: see above.
        prompt_weight: weight of prompt rows; the completion's have 1. The target's distributions inside a prompt are
            known, too, although nothing is ever drafted there.
        matmul_dtype: bfloat16 is about twice as fast where the hardware supports it; weights and sums stay float32.
        objective: None for the forward KL on the accepted path. With a discard weight of 0 the batch's branches are
            ignored.

    Raises:
        ValueError: a prompt weight with the release's semantics, which have none; or an objective with next tokens for
            a batch without them.
    """
    objective = objective or Objective()
    weights = _row_weights(batch, semantics, prompt_weight)  # [B, T + 1]
    wanted = weights > 0
    covered = wanted & _in_draft_vocabulary(draft, head, batch, wanted)
    chains = find_chains(batch, ttt_length) if objective.discard_weight else None
    plan = plan_unroll(covered, ttt_length, None if chains is None else chains.needed(batch))
    states = F.pad(batch.last, (0, 0, 0, 1))[plan.target_sequence, plan.target_row]  # [M, H], zero behind the end
    row_weights = weights[plan.target_sequence, plan.target_row]

    hidden, terms = [], []
    path = unroll(draft, head, batch, plan, ttt_length, matmul_dtype)
    for i, output in enumerate(path.outputs):
        query, target = plan.queries_at(i)
        hidden.append(draft.norm(output[query]))
        share = row_weights[target]
        terms.append(Terms(target, share / share.sum(), STEP_DECAY**i))
    target_head = head.rows(draft.target_ids, matmul_dtype)
    weight, scale = draft.lm_head.weight, draft.config.logit_scale
    emitted = _emitted(draft, batch, plan) if objective.direction == "reverse+next-token" else None
    total, step_loss, agreed = divergence(
        hidden, weight, states, target_head, terms, objective.accepted, emitted, scale, matmul_dtype
    )
    discard_loss, discard_rows = torch.zeros_like(step_loss), torch.zeros(ttt_length, dtype=torch.int64)
    if chains is not None:
        chains = chains.where(_proposable(draft, head, chains.states))
        outputs = unroll_branches(draft, head, batch, plan, path, chains, matmul_dtype)
        hidden, discard_terms = _discard_terms(draft, chains, outputs)
        discard, discard_loss, _ = divergence(
            hidden, weight, chains.states, target_head, discard_terms, objective.discard, None, scale, matmul_dtype
        )
        total = total + objective.discard_weight * discard
        discard_rows = torch.tensor([len(one.target) for one in discard_terms])

    step_rows = torch.tensor([len(one.target) for one in terms])
    return LossOutput(
        total=total,
        step_loss=step_loss,
        step_accuracy=agreed.cpu() / step_rows.clamp(min=1),
        step_rows=step_rows,
        discard_loss=discard_loss,
        discard_rows=discard_rows,
    )


@torch.no_grad()
def draft_choices(
    draft: Eagle3Draft, head: TargetHead, batch: Batch, ttt_length: int, rows: torch.Tensor
) -> torch.Tensor:
    """What the draft would propose, for scoring without training.

    Args:
        rows: bool [B, T], the rows after which a chain starts.

    Returns:
        int64 [K, B, T], target ids: the draft's first choice for the token at t+2+i, given the real tokens up to t+1+i
        (so token i of a chain is meaningful only if those before it were right). -1 where not asked for, or where the
        input token is unknown.
    """
    length = batch.attention_mask.sum(1, keepdim=True)  # [B, 1]
    index = torch.arange(batch.input_ids.shape[1], device=rows.device)
    counts = torch.zeros(len(rows), rows.shape[1] + 1, dtype=torch.bool, device=rows.device)
    for i in range(ttt_length):
        counts[:, 1 + i :] |= (rows & (index + 1 + i < length))[:, : max(rows.shape[1] - i, 0)]
    plan = plan_unroll(counts, ttt_length)
    choices = torch.full((ttt_length, *rows.shape), -1, dtype=torch.int64, device=rows.device)
    target_ids = draft.target_ids
    for i, output in enumerate(unroll(draft, head, batch, plan, ttt_length).outputs):
        query, target = plan.queries_at(i)
        sequence, row = plan.target_sequence[target], plan.target_row[target] - 1 - i
        asked = rows[sequence, row]
        for part, b, t in zip(query[asked].split(256), sequence[asked].split(256), row[asked].split(256), strict=True):
            logits = F.linear(draft.norm(output[part]), draft.lm_head.weight) * draft.config.logit_scale
            choices[i, b, t] = target_ids[logits.argmax(-1)]
    return choices


def _row_weights(batch: Batch, semantics: Semantics, prompt_weight: float) -> torch.Tensor:
    """Weight of each target row. -> float32 [B, T + 1]; only the release uses the column after the end."""
    completion = batch.loss_mask.float()
    if semantics == "aurora-release":
        if prompt_weight:
            raise ValueError("Aurora's release trains no prompt rows")
        return F.pad(completion, (1, 0))
    real = batch.attention_mask.float()
    return F.pad(torch.where(batch.loss_mask, completion, prompt_weight * real), (0, 1))


@torch.no_grad()
def _in_draft_vocabulary(draft: Eagle3Draft, head: TargetHead, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
    """Whether the draft can propose the target's first choice. wanted: bool [B, T + 1] -> bool [B, T + 1]."""
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        return torch.ones_like(wanted)
    if batch.target_argmax is None:
        argmax = torch.full_like(wanted, -1, dtype=torch.int64)
    else:
        argmax = F.pad(batch.target_argmax, (0, 1), value=-1)
    unknown = wanted & (argmax < 0)
    unknown[:, 0] = False  # never a target row
    argmax[unknown] = head.argmax(F.pad(batch.last, (0, 0, 0, 1))[unknown])
    return _draft_ids(draft)[argmax.clamp(min=0)] >= 0


@torch.no_grad()
def _proposable(draft: Eagle3Draft, head: TargetHead, states: torch.Tensor) -> torch.Tensor:
    """The same for single rows. states: float32 [M, H] -> bool [M]."""
    if draft.config.draft_vocab_size == draft.config.vocab_size:
        return torch.ones(len(states), dtype=torch.bool, device=states.device)
    return _draft_ids(draft)[head.argmax(states)] >= 0


def _draft_ids(draft: Eagle3Draft) -> torch.Tensor:
    """Draft id of each target id; -1 for tokens outside the draft vocabulary. int64 [V]"""
    ids = torch.full((draft.config.vocab_size,), -1, dtype=torch.int64, device=draft.d2t.device)
    ids[draft.target_ids] = torch.arange(len(draft.d2t), device=ids.device)
    return ids


def _emitted(draft: Eagle3Draft, batch: Batch, plan: UnrollPlan) -> torch.Tensor:
    """Draft id of the token emitted after each target row; -1 without such a token or without a draft id. int64 [M]"""
    if batch.emitted is None:
        raise ValueError("this batch does not know which tokens the target emitted")
    tokens = F.pad(batch.emitted, (0, 1), value=-1)[plan.target_sequence, plan.target_row]
    return torch.where(tokens >= 0, _draft_ids(draft)[tokens.clamp(min=0)], -1)


def _discard_terms(
    draft: Eagle3Draft, chains: Chains, outputs: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[Terms]]:
    """Hidden states and loss terms of the discard term, by step; a step's rows have equal shares."""
    hidden, terms = [], []
    for i, output in enumerate(outputs):
        target = (chains.step == i).nonzero().squeeze(1)
        hidden.append(draft.norm(output[chains.chain[target]]))
        share = torch.full((len(target),), 1 / max(len(target), 1), device=output.device)
        terms.append(Terms(target, share, STEP_DECAY**i))
    return hidden, terms
