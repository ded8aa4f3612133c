"""Divergence from the target's distribution: the draft's ``lm_head``, the loss and the gradient in one pass.

A loss term with target distribution p and draft logits l = W h, q = softmax(l), has a closed-form gradient with respect
to l: ``q - p`` for the forward KL (objective.py has the others). So the gradient is computed together with the logits,
and no logits are kept. Target rows are processed in chunks; p is computed once and used by every unroll step with that
target row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from aurora_vllm.learner.objective import Forward, Reverse

CHUNK = 256  # target rows at a time; with D = 8192 and three steps the logits of a chunk take 24 MiB


@dataclass(frozen=True)
class Terms:
    """The N loss terms of one unroll step, ordered by target row."""

    target: torch.Tensor  # int64 [N], indices of target rows, ascending
    share: torch.Tensor  # float32 [N], weight of each term in the step's mean; they sum to one
    weight: float  # of the step's mean in the total


def divergence(
    hidden: list[torch.Tensor],
    lm_head: torch.Tensor,
    target_states: torch.Tensor,
    target_head: torch.Tensor,
    terms: list[Terms],
    cost: Forward | Reverse,
    emitted: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    matmul_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum over steps of each step's mean cost at temperature 1.

    Args:
        hidden: per step [N, H], after the draft's final norm.
        lm_head: [D, H], the draft's.
        target_states: [M, Ht], after the target's final norm.
        target_head: [D, Ht] in ``matmul_dtype``, the target's lm_head on the draft vocabulary, on which p is
            renormalised.
        terms: per step.
        cost: of a term.
        emitted: int64 [M], draft id of the token the target emitted after each target row, -1 where there is none;
            needed for a cost with ``next_token``.
        logit_scale: the draft's ``logit_scale`` in vLLM.
        matmul_dtype: of the products with both heads, forward and backward. Softmax and sums are float32.

    Returns:
        total (scalar, differentiable in hidden and lm_head); per step the mean cost, float32 [K], and the number of
        terms in which draft and target agree on the first choice, int64 [K].
    """
    total, step_loss, agreed = _Divergence.apply(
        target_states,
        target_head,
        terms,
        cost,
        emitted,
        logit_scale,
        matmul_dtype,
        torch.is_grad_enabled(),
        lm_head,
        *hidden,
    )
    return total, step_loss, agreed


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        target_head: torch.Tensor,
        terms: list[Terms],
        cost: Forward | Reverse,
        emitted: torch.Tensor | None,
        scale: float,
        dtype: torch.dtype,
        want_grad: bool,
        lm_head: torch.Tensor,
        *hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        step_loss = torch.zeros(len(terms), device=states.device)
        agreed = torch.zeros(len(terms), dtype=torch.int64, device=states.device)
        grad_hidden = [torch.empty_like(h) if want_grad else h for h in hidden]
        grad_head: torch.Tensor | None = None
        weight = lm_head.to(dtype)
        edges = torch.arange(0, len(states) + CHUNK, CHUNK, device=states.device)
        bounds = torch.stack([torch.searchsorted(one.target, edges) for one in terms], 1).tolist()

        def add_chunk(start: int, spans: list[slice]) -> None:
            """Process the target rows from ``start`` on, and each step's terms for them. A function, so that its logits
            are freed before the next chunk's are made."""
            nonlocal grad_head
            target_logits = (states[start : start + CHUNK].to(dtype) @ target_head.T).float()
            aim = cost.aim(target_logits)  # [n, D]
            sizes = [span.stop - span.start for span in spans]
            local = torch.cat([one.target[span] - start for one, span in zip(terms, spans, strict=True)])
            stacked = torch.cat([h[span] for h, span in zip(hidden, spans, strict=True)]) * scale  # [sum of n, H]
            logits = (stacked.to(dtype) @ weight.T).float()  # [sum of n, D]
            choice = logits.argmax(-1)
            right = (choice == target_logits.argmax(-1)[local]).split(sizes)
            parts = zip(logits.split(sizes), choice.split(sizes), local.split(sizes), strict=True)
            for i, (span, (part, first_choice, rows)) in enumerate(zip(spans, parts, strict=True)):
                aimed = aim if len(rows) == len(aim) else aim[rows]  # mostly all of them, which saves a copy
                said = emitted[start + rows] if emitted is not None else None
                step_loss[i] += (cost.cost_(part, first_choice, aimed, said) * terms[i].share[span]).sum()
                agreed[i] += right[i].sum()
            if not want_grad:
                return
            error = logits.to(dtype)  # now the gradient with respect to the logits, without each row's weight
            row_weight = torch.cat([one.share[span] * one.weight for one, span in zip(terms, spans, strict=True)])
            grad_head = _add_product(grad_head, error.T, (stacked * row_weight.unsqueeze(1)).to(dtype))
            grad = (error @ weight) * (row_weight * scale).unsqueeze(1)
            for total_grad, span, part in zip(grad_hidden, spans, grad.split(sizes), strict=True):
                total_grad[span] = part

        for chunk, (first, last) in enumerate(pairwise(bounds)):
            add_chunk(chunk * CHUNK, [slice(a, b) for a, b in zip(first, last, strict=True)])
        total = sum(one.weight * step_loss[i] for i, one in enumerate(terms))
        assert isinstance(total, torch.Tensor)
        if want_grad:
            ctx.grads = (torch.zeros_like(lm_head) if grad_head is None else grad_head, *grad_hidden)
        ctx.mark_non_differentiable(step_loss, agreed)
        return total, step_loss, agreed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not copied, because lm_head's gradient is as large as lm_head; so there can be only one backward pass.
        grads, ctx.grads = ctx.grads, None
        return *(None,) * 8, *(g.mul_(grad) for g in grads)


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b, in place if there is a total; float32 whatever the dtype of the product."""
    if total is None:
        return (a @ b).float()
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
