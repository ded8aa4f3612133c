"""EAGLE-3's attention over an unroll, without a mask over [T, steps * T].

At unroll step i the row at t has seen the target's states up to t, and i further tokens on the draft's own output. Its
keys are those of step 0 at positions <= t, and its *own* keys of steps 1..i, one each (the diagonal). The causal part
is a product per sequence, the diagonal part a row-wise dot product, both under one softmax. Only inputs and outputs are
kept for the backward pass, which recomputes the probabilities block by block (as FlashAttention does): memory is linear
in T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_BLOCK = 128  # queries at a time; not larger, because what lies above a block's diagonal is computed in vain


@dataclass(frozen=True)
class Span:
    """Where one sequence's queries and keys lie in the packed rows.

    Query n is at key ``at[n]`` (ascending) and sees the keys up to there. Without ``at`` the queries are the sequence's
    last rows.
    """

    query_start: int
    queries: int
    key_start: int
    keys: int
    at: tuple[int, ...] | None = None


def ttt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_keys: list[torch.Tensor],
    own_values: list[torch.Tensor],
    spans: list[Span],
    matmul_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attention of one unroll step, over packed sequences.

    Args:
        query: [A, heads, D], rotated; the A query rows of all sequences.
        key, value: [S, kv_heads, D] of step 0; the S key rows of all sequences.
        own_keys, own_values: of steps 1..i, each [A, kv_heads, D]; a row sees only its own.
        spans: of the sequences.
        matmul_dtype: of the products with probabilities and their gradients. Scores and their softmax are always
            float32: in bfloat16 a score of 16 would be off by 0.06.

    Returns:
        [A, heads * D]
    """
    inputs = [x.float() for x in (query, key, value, *own_keys, *own_values)]
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _TTTAttention.apply(spans, matmul_dtype, *inputs)
    return output.flatten(1)


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spans: list[Span],
        dtype: torch.dtype,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        steps = len(own) // 2
        q = _scaled(query, key.shape[1])  # [A, kv, group, D]
        own_scores = _own_scores(q, own[:steps])  # [A, kv, group, steps]
        output, own_p = torch.empty_like(q), torch.empty_like(own_scores)
        for rows, keys, ahead in _blocks(spans, q.device):
            p, own_p[rows] = _probabilities(q[rows], key[keys], own_scores[rows], ahead)
            output[rows] = _rows_first(_product(p, value[keys].transpose(0, 1), dtype), q[rows].shape)
        for i, own_value in enumerate(own[steps:]):
            output.addcmul_(own_p[..., i : i + 1], own_value.unsqueeze(2))
        ctx.save_for_backward(q, key, value, output, *own)
        ctx.spans, ctx.dtype = spans, dtype
        return output.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, key, value, output, *own = ctx.saved_tensors
        steps, dtype = len(own) // 2, ctx.dtype
        grad = grad.reshape(q.shape)
        mean = (grad * output).sum(-1)  # [A, kv, group]; the softmax's sum over p * dp
        grad_q, grad_key, grad_value = torch.empty_like(q), torch.zeros_like(key), torch.zeros_like(value)
        own_scores = _own_scores(q, own[:steps])
        own_p = torch.empty_like(own_scores)
        for rows, keys, ahead in _blocks(ctx.spans, q.device):
            q_block, grad_block = _heads_first(q[rows]), _heads_first(grad[rows])
            k_block, v_block = key[keys].transpose(0, 1), value[keys].transpose(0, 1)
            p, own_p[rows] = _probabilities(q[rows], key[keys], own_scores[rows], ahead)
            grad_value[keys] += _product(p.transpose(1, 2), grad_block, dtype).transpose(0, 1)
            grad_scores = _product(grad_block, v_block.transpose(1, 2), dtype)
            grad_scores.sub_(_heads_first(mean[rows].unsqueeze(-1))).mul_(p)
            grad_q[rows] = _rows_first(_product(grad_scores, k_block, dtype), q[rows].shape)
            grad_key[keys] += _product(grad_scores.transpose(1, 2), q_block, dtype).transpose(0, 1)
        grad_own_keys, grad_own_values = [], []
        for i, (own_key, own_value) in enumerate(zip(own[:steps], own[steps:], strict=True)):
            p = own_p[..., i]
            grad_scores = p * ((grad * own_value.unsqueeze(2)).sum(-1) - mean)
            grad_q.addcmul_(grad_scores.unsqueeze(-1), own_key.unsqueeze(2))
            grad_own_keys.append((grad_scores.unsqueeze(-1) * q).sum(2))
            grad_own_values.append((p.unsqueeze(-1) * grad).sum(2))
        grad_q.mul_(q.shape[-1] ** -0.5)
        return None, None, grad_q.flatten(1, 2), grad_key, grad_value, *grad_own_keys, *grad_own_values


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [kv, n, k], [kv, k, m] -> float32 [kv, n, m], by a product in dtype."""
    return torch.bmm(a.to(dtype), b.to(dtype)).float()


def _scaled(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[A, heads, D] -> [A, kv, group, D], over sqrt(D). Neighbouring heads share a key head, as in Llama."""
    rows, heads, dim = query.shape
    return (query * dim**-0.5).view(rows, kv_heads, heads // kv_heads, dim)


def _own_scores(q: torch.Tensor, own_keys: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> torch.Tensor:
    """q: [A, kv, group, D], own_keys: each [A, kv, D] -> [A, kv, group, steps]."""
    if not own_keys:
        return q.new_empty(*q.shape[:-1], 0)
    return torch.stack([(q * key.unsqueeze(2)).sum(-1) for key in own_keys], dim=-1)


def _blocks(spans: list[Span], device: torch.device) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks: query rows [n], the key rows they see [seen], and bool [n, m]: which of the last m keys are in a query's
    future. The last query of a block sees the last key of its slice.
    """
    for one in spans:
        at = one.at if one.at is not None else range(one.keys - one.queries, one.keys)
        for start in range(0, one.queries, _BLOCK):
            stands = at[start : start + _BLOCK]
            rows = slice(one.query_start + start, one.query_start + start + len(stands))
            near = torch.arange(stands[0], stands[-1] + 1, device=device)
            own = near if one.at is None else torch.tensor(stands, device=device)
            yield rows, slice(one.key_start, one.key_start + stands[-1] + 1), near > own.unsqueeze(1)


def _probabilities(
    q: torch.Tensor, key: torch.Tensor, own_scores: torch.Tensor, ahead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys that a block of queries sees and over the queries' own keys.

    Args:
        q: [n, kv, group, D].
        key: [seen, kv, D].
        own_scores: [n, kv, group, steps].
        ahead: bool [n, m], which of the last m keys are in a query's future.

    Returns:
        Probabilities, [kv, group * n, seen] and [n, kv, group, steps].
    """
    scores = torch.bmm(_heads_first(q), key.permute(1, 2, 0))
    n, kv, group, _ = q.shape
    scores.view(kv, group, n, -1)[..., -ahead.shape[1] :].masked_fill_(ahead, -torch.inf)
    if own_scores.shape[-1]:
        scores = torch.cat([scores, _heads_first(own_scores)], -1)
    p, own_p = torch.softmax(scores, -1).split([len(key), own_scores.shape[-1]], -1)
    return p, _rows_first(own_p, q.shape)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[n, kv, group, X] -> [kv, group * n, X]."""
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def _rows_first(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[kv, group * n, X] -> [n, kv, group, X]."""
    n, _, group, _ = shape
    return x.unflatten(1, (group, n)).permute(2, 0, 1, 3)
