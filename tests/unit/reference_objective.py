"""The family of objectives in numpy, in float64, written from the formulas: tests compare the torch ones with these.

A branch is run as what it is: the draft, token by token, on a sequence that has the draft's wrong tokens where the path
goes on otherwise (``spliced``). Nothing of branches.py's bookkeeping is needed for that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Branch
from tests.unit.naive_eagle3 import Sizes, naive_logits, naive_mask, random_case, shift

Array = np.ndarray
Case = tuple[Eagle3Draft, TargetHead, Batch]


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def top_k(p: Array, k: int) -> Array:
    """p on its k most probable entries, renormalised; k = 0 is p."""
    if k == 0:
        return p
    smallest = np.sort(p, -1)[..., ::-1][..., : min(k, p.shape[-1])][..., -1:]
    kept = np.where(p >= smallest, p, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def forward_cost(target: Array, logits: Array, k: int = 0) -> tuple[Array, Array]:
    """-sum p log q of each row [n], and its gradient in the logits [n, D]."""
    p, log_q = top_k(np.exp(log_softmax(target)), k), log_softmax(logits)
    return -(p * log_q).sum(-1), np.exp(log_q) - p


def reverse_cost(target: Array, logits: Array, emitted: Array | None = None) -> tuple[Array, Array]:
    """KL(q || p) of each row, with ``emitted`` (draft ids, or -1) plus -log q(emitted)."""
    log_p, log_q = log_softmax(target), log_softmax(logits)
    q = np.exp(log_q)
    cost = (q * (log_q - log_p)).sum(-1)
    gradient = q * (log_q - log_p - cost[..., None])
    if emitted is not None:
        for row, token in enumerate(emitted):
            if token >= 0:
                cost[row] -= log_q[row, token]
                gradient[row] += q[row] - np.eye(q.shape[-1])[token]
    return cost, gradient


def accepted_cost(objective: Objective, target: Array, logits: Array, emitted: Array) -> tuple[Array, Array]:
    if objective.direction == "forward":
        return forward_cost(target, logits)
    return reverse_cost(target, logits, emitted if objective.direction == "reverse+next-token" else None)


@dataclass
class Reference:
    total: float
    step_loss: list[float]
    discard_loss: list[float]
    discard_rows: list[int]


def in_float64(draft: Eagle3Draft, head: TargetHead, batch: Batch) -> tuple[Eagle3Draft, TargetHead, Batch]:
    exact = copy.deepcopy(draft).double()
    if exact.embed_tokens is not None:
        exact.embed_tokens = exact.embed_tokens.double()
    head = TargetHead(head.embed_tokens.double(), head.lm_head.double())
    return exact, head, replace(batch, aux=batch.aux.double(), last=batch.last.double())


def spliced(batch: Batch, b: int, branch: Branch) -> Batch:
    """One sequence: the path up to the branch, then the branch. Nothing is known of the target there but states."""
    kept = branch.position - int(batch.positions[b, 0])
    more = len(branch.token_ids)
    ids = torch.cat([batch.input_ids[b, :kept], branch.token_ids])
    return Batch(
        input_ids=ids.unsqueeze(0),
        aux=torch.cat([batch.aux[b, :kept], torch.full((more, batch.aux.shape[-1]), 1e3).to(batch.aux)]).unsqueeze(0),
        last=torch.cat([batch.last[b, :kept], branch.last.to(batch.last)]).unsqueeze(0),
        attention_mask=torch.ones(1, len(ids), dtype=torch.bool),
        loss_mask=torch.ones(1, len(ids), dtype=torch.bool),
        positions=(batch.positions[b, 0] + torch.arange(len(ids))).unsqueeze(0),
    )


@torch.no_grad()
def reference_objective(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: Batch,
    ttt_length: int,
    objective: Objective,
    prompt_weight: float = 0.0,
) -> Reference:
    """The whole objective. Draft, head and batch in float64."""
    target_ids = draft.target_ids.tolist()
    target_head, whole_head = head.lm_head[draft.target_ids].numpy(), head.lm_head.numpy()
    draft_id = {target: i for i, target in enumerate(target_ids)}

    def counts(states: Array) -> bool:
        return int((whole_head @ states).argmax()) in draft_id

    states, mask = shift(batch.last), naive_mask(batch, "default", prompt_weight)
    emitted = torch.full_like(batch.input_ids, -1) if batch.emitted is None else batch.emitted
    emitted = shift(emitted + 1) - 1
    step_loss = []
    for logits in naive_logits(draft, head, batch, ttt_length):
        costs = weights = 0.0
        for b, t in np.argwhere(mask.numpy() > 0):
            z = states[b, t].numpy()
            if not counts(z):
                continue
            said = np.array([draft_id.get(int(emitted[b, t]), -1)])
            cost, _ = accepted_cost(objective, (target_head @ z)[None], logits[b, t].numpy()[None], said)
            costs, weights = costs + float(mask[b, t]) * float(cost[0]), weights + float(mask[b, t])
        step_loss.append(costs / weights if weights else 0.0)
        states, mask, emitted = shift(states), shift(mask), shift(emitted + 1) - 1

    terms: list[list[float]] = [[] for _ in range(ttt_length)]
    for b, branches in enumerate(batch.branches if objective.discard_weight else []):
        for branch in branches:
            certain = branch.position - 1 - branch.accepted - int(batch.positions[b, 0])  # the verification's own row
            root = certain - 1  # the last row whose successor, that token, was known when the drafts were made
            if root < 0:
                continue
            logits = naive_logits(draft, head, spliced(batch, b, branch), ttt_length)
            for n, z in enumerate(branch.last.double().numpy()):
                step = branch.accepted + 1 + n
                if step < ttt_length and counts(z):
                    row = logits[step][0, root].numpy()
                    cost, _ = forward_cost((target_head @ z)[None], row[None], objective.discard_top_k)
                    terms[step].append(float(cost[0]))
    discard_loss = [float(np.mean(one)) if one else 0.0 for one in terms]
    total = sum(
        0.8**i * (a + objective.discard_weight * d)
        for i, (a, d) in enumerate(zip(step_loss, discard_loss, strict=True))
    )
    return Reference(total, step_loss, discard_loss, [len(one) for one in terms])


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
