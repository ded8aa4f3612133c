"""Training-time test: the draft run K steps on its own output, over packed rows.

At step i the row at t reads the token at t+1+i and, as hidden state, ``fc`` of the target's auxiliary states at t (i
= 0) or the draft's own output of step i-1; it is at position t+i and predicts the token at t+2+i. The target's state at
j = t+1+i gives what it should predict, so a loss term is determined by its *target row* j and its step:

    step 0:  t = j-1        step 1:  t = j-2        step 2:  t = j-3    ...

Only what loss terms need is computed: a prompt without loss costs keys and values, but no query, MLP or head. The token
half of q, k and v depends on j only, so it is computed once for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aurora_vllm.learner.attention import Span, ttt_attention
from aurora_vllm.learner.batch import Batch
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.rope import cos_sin, rotate
from aurora_vllm.learner.target import TargetHead


@dataclass(frozen=True)
class UnrollPlan:
    """The rows of an unroll: S key rows (all t up to the last needed one), of which A are active (they predict)."""

    spans: list[Span]
    sequence: torch.Tensor  # int64 [S], b
    row: torch.Tensor  # int64 [S], t
    active: torch.Tensor | None  # int64 [A], indices of key rows; None if all are active
    last_of_sequence: torch.Tensor  # int64 [A], index of the last key row of the same sequence
    target_sequence: torch.Tensor  # int64 [M], b of each target row that counts
    target_row: torch.Tensor  # int64 [M], j
    query_of_target: torch.Tensor  # int64 [M], index of the active row with t = j-1; that of step i is i lower

    def queries_at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A step's loss terms: indices of active rows, int64 [N], and of target rows, int64 [N], ascending. A
        sequence's first target rows have no such t."""
        reachable = (self.target_row > step).nonzero().squeeze(1)
        return self.query_of_target[reachable] - step, reachable


@dataclass(frozen=True)
class Unrolled:
    """The result of K unroll steps. Branches continue from it (branches.py)."""

    outputs: list[torch.Tensor]  # K of [A, H]: after each step, before the final norm that precedes ``lm_head``
    hidden: list[torch.Tensor]  # K of [A, H]: the input of the next step; equals ``outputs`` for most drafts
    key: torch.Tensor  # [S, kv_heads, D], of step 0
    value: torch.Tensor  # [S, kv_heads, D]
    own_keys: list[torch.Tensor]  # K - 1 of [A, kv_heads, D], of steps 1 ..
    own_values: list[torch.Tensor]


def plan_unroll(counts: torch.Tensor, ttt_length: int, needed: torch.Tensor | None = None) -> UnrollPlan:
    """Plan an unroll.

    Args:
        counts: bool [B, T + 1], whether target row j counts; column 0 is ignored (no row comes before it).
        ttt_length: K.
        needed: bool [B, T], further rows t that must be active.
    """
    spans: list[Span] = []
    rows, targets, active = [], [], []
    key_start = query_start = 0
    for b in range(len(counts)):
        target = counts[b, 1:].nonzero().squeeze(1) + 1
        beside = target[:0] if needed is None else needed[b].nonzero().squeeze(1)
        if len(target) + len(beside) == 0:
            continue
        keys = int(torch.cat([target, beside + 1]).max())
        first = max(0, int(torch.cat([target - ttt_length, beside]).min()))
        spans.append(Span(query_start, keys - first, key_start, keys))
        row = torch.arange(keys, device=counts.device)
        rows.append(torch.stack([torch.full_like(row, b), row]))
        active.append(torch.stack([row[first:] + key_start, torch.full_like(row[first:], key_start + keys - 1)]))
        targets.append(torch.stack([torch.full_like(target, b), target, target - 1 - first + query_start]))
        key_start, query_start = key_start + keys, query_start + keys - first
    empty = torch.zeros(3, 0, dtype=torch.int64, device=counts.device)
    sequence, row = torch.cat(rows, 1) if rows else empty[:2]
    index, last = torch.cat(active, 1) if active else empty[:2]
    target_sequence, target_row, query = torch.cat(targets, 1) if targets else empty
    everything = key_start == query_start
    return UnrollPlan(spans, sequence, row, None if everything else index, last, target_sequence, target_row, query)


def unroll(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: Batch,
    plan: UnrollPlan,
    ttt_length: int,
    matmul_dtype: torch.dtype = torch.float32,
) -> Unrolled:
    """Run the draft for K steps.

    ``matmul_dtype`` is for the linear layers; residuals, norms and softmax stay float32.
    """
    with linear_layers_in(matmul_dtype, batch.aux.device):
        return _unroll(draft, head, batch, plan, ttt_length, matmul_dtype)


def _unroll(
    draft: Eagle3Draft, head: TargetHead, batch: Batch, plan: UnrollPlan, ttt_length: int, dtype: torch.dtype
) -> Unrolled:
    attn, layer, config = draft.midlayer.self_attn, draft.midlayer, draft.config
    # Split and cast once, not in every step: autocast caches only whole parameters, and each step's gradient of a part
    # would be padded to the whole.
    halves = [p.weight.to(dtype).split(config.hidden_size, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    (q_token, q_hidden), (k_token, k_hidden), (v_token, v_hidden) = halves

    def pick(x: torch.Tensor) -> torch.Tensor:  # [S, ...] -> [A, ...]
        return x if plan.active is None else x[plan.active]

    # The token at t+1; after the last column token 0, the release's padding.
    ids = F.pad(batch.input_ids, (0, 1))[plan.sequence, plan.row + 1]
    tokens = layer.input_layernorm(embed(draft, head, ids))  # [S, H], at j = t+1
    token_q = F.linear(pick(tokens), q_token, attn.q_proj.bias)
    token_k = F.linear(tokens, k_token, attn.k_proj.bias)
    token_v = F.linear(tokens, v_token, attn.v_proj.bias)
    # A trajectory may start at a position > 0 (prefix-cache hit); rows of one sequence are consecutive.
    positions = batch.positions[:, 0][plan.sequence] + plan.row  # [S]
    active = plan.active if plan.active is not None else torch.arange(len(plan.row), device=plan.row.device)
    query_offset = active - torch.arange(len(active), device=active.device)  # from A to S, constant in a sequence

    hidden = draft.combine(batch.aux[plan.sequence, plan.row]).float()  # [S, H]
    outputs: list[torch.Tensor] = []
    carried: list[torch.Tensor] = []
    own_keys: list[torch.Tensor] = []
    own_values: list[torch.Tensor] = []
    key = value = torch.empty(0)
    for step in range(ttt_length):
        normed = layer.hidden_norm(hidden)
        if step == 0:
            cos, sin = cos_sin(positions, draft.frequencies)
            key = rotated_keys(draft, token_k + F.linear(normed, k_hidden), cos, sin)
            value = split_heads(draft, token_v + F.linear(normed, v_hidden))
            hidden, normed, cos, sin = pick(hidden), pick(normed), pick(cos), pick(sin)
            query = token_q
        else:
            # Rows past the last target row do not count; they read the last token again, to stay in bounds.
            shifted = torch.minimum(active + step, plan.last_of_sequence)  # [A] into S
            cos, sin = cos_sin(positions[active] + step, draft.frequencies)
            own_keys.append(rotated_keys(draft, token_k[shifted] + F.linear(normed, k_hidden), cos, sin))
            own_values.append(split_heads(draft, token_v[shifted] + F.linear(normed, v_hidden)))
            query = token_q[shifted - query_offset]
        query = rotated_queries(draft, query + F.linear(normed, q_hidden), cos, sin)
        attended = ttt_attention(query, key, value, own_keys, own_values, plan.spans, dtype)
        output = draft.finish(attended, normed if config.norm_before_residual else hidden)
        outputs.append(output)
        hidden = draft.norm(output) if config.norm_output else output
        carried.append(hidden)
    return Unrolled(outputs, carried, key, value, own_keys, own_values)


def linear_layers_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which linear layers multiply in bfloat16, if that is the dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def split_heads(draft: Eagle3Draft, x: torch.Tensor) -> torch.Tensor:
    """[N, heads * D] -> [N, heads, D]"""
    return x.unflatten(-1, (-1, draft.config.head_dim))


def rotated_keys(draft: Eagle3Draft, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys for the attention, split into heads: normalised if the draft's layer does so, then rotated.

    Args:
        x: what ``k_proj`` gives, [N, kv_heads * D].
        cos, sin: of the positions.
    """
    keys = split_heads(draft, x)
    return rotate(draft.midlayer.self_attn.k_norm(keys.float()) if draft.config.qk_norm else keys, cos, sin)


def rotated_queries(draft: Eagle3Draft, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same for queries."""
    queries = split_heads(draft, x)
    return rotate(draft.midlayer.self_attn.q_norm(queries.float()) if draft.config.qk_norm else queries, cos, sin)


def embed(draft: Eagle3Draft, head: TargetHead, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings for the draft: its own if it has any, else the target's. int64 [N] -> float32 [N, H]."""
    return F.embedding(ids, draft.embed_tokens) if draft.embed_tokens is not None else head.embed(ids)
