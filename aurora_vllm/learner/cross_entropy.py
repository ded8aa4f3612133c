"""Soft cross-entropy against the target's distribution, with the draft's ``lm_head`` and its gradient in one pass.

A loss term with target distribution p and draft logits l = W h, q = softmax(l), costs ``-sum_v p(v) log q(v)``, that
is KL(p || q) + H(p); its gradient with respect to l is ``q - p``. So the gradient is known as soon as the logits are,
and no logits are kept: target rows are taken a chunk at a time, p is computed once and serves every unroll step that
aims at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

_CHUNK = 128  # target rows at a time; with D = 8192 and three steps the logits of a chunk take 12 MiB


@dataclass(frozen=True)
class Terms:
    """The loss terms of one unroll step: N of them, ordered by target row."""

    target: torch.Tensor  # int64 [N] into the M target rows, ascending
    share: torch.Tensor  # float32 [N], weight of the term in the step's mean; sums to one
    weight: float  # of the step in the total


def soft_cross_entropy(
    hidden: list[torch.Tensor],
    lm_head: torch.Tensor,
    target_states: torch.Tensor,
    target_head: torch.Tensor,
    terms: list[Terms],
    logit_scale: float = 1.0,
    matmul_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Weighted sum over steps of each step's mean soft cross-entropy at temperature 1.

    Args:
        hidden: per step [N, H], after the draft's final norm.
        lm_head: [D, H], the draft's.
        target_states: [M, Ht], after the target's final norm.
        target_head: [D, Ht], the target's lm_head on the draft vocabulary: p is renormalised there.
        terms: per step.
        logit_scale: vLLM's ``logit_scale`` of the draft.
        matmul_dtype: of the products with ``lm_head``, forward and backward. p, softmax and sums stay float32.

    Returns:
        total (scalar, differentiable in hidden and lm_head), mean per step float32 [K], and per step bool [N]: whether
        draft and target agree on the first choice.
    """
    total, step_loss, *agree = _SoftCrossEntropy.apply(
        target_states, target_head, terms, logit_scale, matmul_dtype, torch.is_grad_enabled(), lm_head, *hidden
    )
    return total, step_loss, agree


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        target_head: torch.Tensor,
        terms: list[Terms],
        scale: float,
        dtype: torch.dtype,
        want_grad: bool,
        lm_head: torch.Tensor,
        *hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        step_loss = torch.zeros(len(terms), device=states.device)
        agree = [torch.zeros(len(one.target), dtype=torch.bool, device=states.device) for one in terms]
        grad_hidden = [torch.empty_like(h) if want_grad else h for h in hidden]
        grad_head = torch.zeros_like(lm_head) if want_grad else lm_head
        weight = lm_head.to(dtype)
        edges = torch.arange(0, len(states) + _CHUNK, _CHUNK, device=states.device)
        bounds = torch.stack([torch.searchsorted(one.target, edges) for one in terms], 1).tolist()
        for c, (first, last) in enumerate(pairwise(bounds)):
            start = c * _CHUNK
            logits = states[start : start + _CHUNK] @ target_head.T
            best = logits.argmax(-1)  # [n]
            p = torch.softmax(logits, -1)  # [n, D]
            parts = [h[a:b] for h, a, b in zip(hidden, first, last, strict=True)]
            stacked = torch.cat(parts) * scale  # [sum of n, H]
            q = (stacked.to(dtype) @ weight.T).float()  # logits, [sum of n, D]
            highest, choice = q.max(-1)
            offset = 0
            dot = []
            for i, (a, b) in enumerate(zip(first, last, strict=True)):
                local = terms[i].target[a:b] - start
                p_i = p if b - a == len(p) else p[local]
                dot.append(torch.linalg.vecdot(p_i, q[offset : offset + b - a]))
                agree[i][a:b] = choice[offset : offset + b - a] == best[local]
                offset += b - a
            torch.softmax(q, -1, out=q)
            log_sum = highest - q.gather(1, choice.unsqueeze(1)).squeeze(1).log_()
            offset = 0
            for i, (a, b) in enumerate(zip(first, last, strict=True)):
                rows = slice(offset, offset + b - a)
                step_loss[i] += ((log_sum[rows] - dot[i]) * terms[i].share[a:b]).sum()
                if want_grad:
                    q[rows] -= p if b - a == len(p) else p[terms[i].target[a:b] - start]
                offset += b - a
            if want_grad:  # q is now the gradient with respect to the logits, but for each row's weight
                row_weight = torch.cat([t.share[a:b] * t.weight for t, a, b in zip(terms, first, last, strict=True)])
                error = q.to(dtype)
                _add_product(grad_head, error.T, (stacked * row_weight.unsqueeze(1)).to(dtype))
                grad = (error @ weight) * (row_weight * scale).unsqueeze(1)
                for g, part, a, b in zip(grad_hidden, grad.split([len(x) for x in parts]), first, last, strict=True):
                    g[a:b] = part
        total = sum(one.weight * step_loss[i] for i, one in enumerate(terms))
        assert isinstance(total, torch.Tensor)
        if want_grad:
            ctx.save_for_backward(grad_head, *grad_hidden)
        ctx.mark_non_differentiable(step_loss, *agree)
        return total, step_loss, *agree

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = ctx.saved_tensors
        return None, None, None, None, None, None, *(g * grad for g in grads)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; total is float32 whatever the dtype of the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
