"""Unrolls rejected branches: the draft after its own wrong prefix, where the target's distribution is known, too.

A verification whose last certain token is at path row r checked draft tokens at r+1, r+2, ...; ``accepted`` = a of them
were right, so the branch's tokens c_0, c_1, ... are at P = r+1+a, P+1, ... and replace the path's from row P on. The
chain that made these tokens starts after row t = r-1 (unroll.py), the last row whose next token was known and whose
states the target had computed:

    step          reads              predicts the token at    the target's distribution is at
    0 .. a        path, at t+1+i     t+2+i = r+1 .. P         path row t+1+i: the accepted term has it
    d = a+1       c_0, at P          P+1                      branch row 0
    d+n           c_n, at P+n        P+1+n                    branch row n

The last branch row follows the last draft token; a chain reaches it if the unroll is long enough. Up to step a, a chain
is the same as the path's unroll from row t (keys, values and hidden states), so only steps from d on are computed.

The rejected token itself, c_0, was proposed while the prefix was still right. Its target distribution is at path row
P-1, which the accepted term trains at this step (a) as at all others. It is not part of the discard term, which
consists of the rows *after* it, with the wrong prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from aurora_vllm.learner.attention import Span, ttt_attention
from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.rope import cos_sin
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.unroll import (
    Unrolled,
    UnrollPlan,
    embed,
    linear_layers_in,
    rotated_keys,
    rotated_queries,
    split_heads,
)


@dataclass(frozen=True)
class Chains:
    """N chains, ordered by (leaves, sequence, root), and the M branch rows they reach; on the batch's device."""

    sequence: torch.Tensor  # int64 [N], b
    root: torch.Tensor  # int64 [N], t: the row after which the chain starts
    leaves: torch.Tensor  # int64 [N], d: the first step that reads a branch token
    tokens: torch.Tensor  # int64 [N, K], the token that step i reads, for i >= d; 0 after the branch's end
    states: torch.Tensor  # float32 [M, H]: the target's state at each branch row, after its final norm
    chain: torch.Tensor  # int64 [M], index of the row's chain
    step: torch.Tensor  # int64 [M], ascending: the step whose target is the row

    def needed(self, batch: Batch) -> torch.Tensor:
        """Path rows that the unroll must compute for these chains: their roots, and the tokens up to d. bool [B, T]"""
        rows = torch.zeros_like(batch.attention_mask)
        rows[self.sequence, self.root] = True
        rows[self.sequence, self.root + self.leaves - 1] = True
        return rows

    def where(self, rows: torch.Tensor) -> Chains:
        """The same with a subset of the branch rows. rows: bool [M]"""
        return Chains(
            self.sequence, self.root, self.leaves, self.tokens, self.states[rows], self.chain[rows], self.step[rows]
        )


def find_chains(batch: Batch, ttt_length: int) -> Chains:
    """The chains of a batch that an unroll of K steps reaches.

    A branch is left out if its root lies before the sequence's first row (a prefix-cache hit, or a long request that
    was cut), or if all K steps are on the path.
    """
    found = []
    for b, (start, branches) in enumerate(zip(batch.positions[:, 0].tolist(), batch.branches, strict=False)):
        for one in branches:
            root = one.position - 2 - one.accepted - start
            if root >= 0 and one.accepted + 1 < ttt_length:
                found.append((one.accepted + 1, b, root, one))
    found.sort(key=lambda chain: chain[:3])
    tokens = torch.zeros(len(found), ttt_length, dtype=torch.int64)
    chain: list[int] = []
    step: list[int] = []
    states = [batch.last.new_zeros(0, batch.last.shape[-1])]
    for n, (leaves, _, _, one) in enumerate(found):
        rows = min(len(one.token_ids), ttt_length - leaves)
        tokens[n, leaves : leaves + rows] = one.token_ids[:rows]
        chain += [n] * rows
        step += range(leaves, leaves + rows)
        states.append(one.last[:rows].to(batch.last))
    where = torch.tensor([one[:3] for one in found], dtype=torch.int64).view(-1, 3).to(batch.last.device)
    by_step, order = torch.tensor(step, dtype=torch.int64, device=where.device).sort(stable=True)
    return Chains(
        sequence=where[:, 1],
        root=where[:, 2],
        leaves=where[:, 0],
        tokens=tokens.to(where.device),
        states=torch.cat(states)[order],
        chain=torch.tensor(chain, dtype=torch.int64, device=where.device)[order],
        step=by_step,
    )


def unroll_branches(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: Batch,
    plan: UnrollPlan,
    path: Unrolled,
    chains: Chains,
    matmul_dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Continue the unroll from where each chain leaves the path.

    Args:
        plan, path: the path's unroll, made with the rows ``chains.needed``.
        matmul_dtype: see ``unroll``.

    Returns:
        K tensors [chains with d <= i, H]: hidden states after step i of those chains (the first ones) that have left
        the path by then, before the final norm that precedes ``lm_head``.
    """
    attn, layer, config = draft.midlayer.self_attn, draft.midlayer, draft.config
    query, spans = _places(batch, plan, chains)
    positions = batch.positions[chains.sequence, chains.root]

    hidden = path.outputs[0][:0]
    outputs = [hidden]  # no chain leaves at step 0
    own_keys: list[torch.Tensor] = []
    own_values: list[torch.Tensor] = []
    with linear_layers_in(matmul_dtype, batch.aux.device):
        for step in range(1, len(path.outputs)):
            left = int((chains.leaves <= step).sum())
            arriving = query[len(hidden) : left]  # [n] into A
            hidden = torch.cat([hidden, path.hidden[step - 1][arriving]])
            for own, of_path in ((own_keys, path.own_keys), (own_values, path.own_values)):
                own[:] = [torch.cat([mine, theirs[arriving]]) for mine, theirs in zip(own, of_path, strict=False)]
            normed = layer.hidden_norm(hidden)
            tokens = layer.input_layernorm(embed(draft, head, chains.tokens[:left, step]))
            x = torch.cat([tokens, normed], -1)
            q, k, v = (projection(x) for projection in (attn.q_proj, attn.k_proj, attn.v_proj))
            cos, sin = cos_sin(positions[:left] + step, draft.frequencies)
            own_keys.append(rotated_keys(draft, k, cos, sin))
            own_values.append(split_heads(draft, v))
            here = [one for one in spans if one.query_start < left]
            q = rotated_queries(draft, q, cos, sin)
            attended = ttt_attention(q, path.key, path.value, own_keys, own_values, here, matmul_dtype)
            output = draft.finish(attended, normed if config.norm_before_residual else hidden)
            outputs.append(output)
            hidden = draft.norm(output) if config.norm_output else output
    return outputs


def _places(batch: Batch, plan: UnrollPlan, chains: Chains) -> tuple[torch.Tensor, list[Span]]:
    """The chains' roots as indices into the active rows, int64 [N], and one span for the chains of each sequence."""
    width = batch.input_ids.shape[1]
    order = plan.sequence * width + plan.row  # [S], ascending; so are the active rows
    active = order if plan.active is None else order[plan.active]
    wanted = chains.sequence * width + chains.root
    query = torch.searchsorted(active, wanted)
    first_key = torch.searchsorted(order, wanted) - chains.root
    roots, first_keys = chains.root.tolist(), first_key.tolist()
    spans = []
    groups = zip(chains.leaves.tolist(), chains.sequence.tolist(), strict=True)
    for _, members in groupby(range(len(roots)), key=list(groups).__getitem__):
        start, *rest = members
        at = tuple(roots[start : start + 1 + len(rest)])
        spans.append(Span(start, len(at), first_keys[start], at[-1] + 1, at))
    return query, spans
