"""The family of objectives: the divergences, and their cost per row.

The paper's objective (arXiv 2602.06932) is ``E_accept[KL(p || q)] + lambda * E_discard[KL(p || q)]``, with p the
target's distribution and q the draft's, both at temperature 1 on the draft vocabulary. With l the draft's logits and
x the token that the target emitted after the row, a row of the accepted path costs

    forward              -sum_v p(v) log q(v), which is KL(p || q) + H(p)     gradient in l:  q - p
    reverse              KL(q || p) = sum_v q(v) log (q(v) / p(v))            q (log (q / p) - KL)
    reverse+next-token   KL(q || p) - log q(x)                                the same, plus q - onehot(x)

and a row of the discard term always costs ``-sum_v p_k(v) log q(v)``. p_k is p on its k most probable tokens,
renormalised, and 0 elsewhere, while q keeps the whole draft vocabulary. So proposed tokens outside the k lose
probability, which would not happen if q were renormalised on the k. This is also why the discard term stays forward:
the reverse divergence from p_k is infinite. k = 0 means p itself.

branches.py defines the rows; docs/objective.md relates each symbol to the fields of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "reverse", "reverse+next-token"]


@dataclass(frozen=True)
class Forward:
    """KL(p || q) up to p's own entropy, that is the cross-entropy.

    ``top_k`` > 0: p is restricted to that many most probable tokens, and renormalised.
    """

    top_k: int = 0

    def aim(self, target_logits: torch.Tensor) -> torch.Tensor:
        """The target's part of the cost, for ``cost_``. float32 [n, D] -> p, float32 [n, D]."""
        if not 0 < self.top_k < target_logits.shape[1]:
            return torch.softmax(target_logits, -1)
        highest, tokens = target_logits.topk(self.top_k, sorted=False)
        return torch.zeros_like(target_logits).scatter_(1, tokens, torch.softmax(highest, -1))

    def cost_(
        self, logits: torch.Tensor, choice: torch.Tensor, aim: torch.Tensor, emitted: torch.Tensor | None
    ) -> torch.Tensor:
        """Cost of each row; ``logits`` are replaced by its gradient.

        Args:
            logits: float32 [n, D], the draft's.
            choice: int64 [n], argmax of each row of logits.
            aim: float32 [n, D], from ``aim``.
            emitted: not used.

        Returns:
            float32 [n], nats.
        """
        choice = choice.unsqueeze(1)
        highest = logits.gather(1, choice).squeeze(1)
        dot = torch.linalg.vecdot(aim, logits)
        torch.softmax(logits, -1, out=logits)
        # log-sum-exp from the largest logit and its probability saves a pass over the vocabulary
        cost = highest - logits.gather(1, choice).squeeze(1).log_() - dot
        logits -= aim
        return cost


@dataclass(frozen=True)
class Reverse:
    """KL(q || p), with ``next_token`` also the cross-entropy of the emitted token."""

    next_token: bool = False

    def aim(self, target_logits: torch.Tensor) -> torch.Tensor:
        """As ``Forward.aim``, but log p."""
        return torch.log_softmax(target_logits, -1)

    def cost_(
        self, logits: torch.Tensor, choice: torch.Tensor, aim: torch.Tensor, emitted: torch.Tensor | None
    ) -> torch.Tensor:
        """As ``Forward.cost_``. ``emitted``: int64 [n], draft ids; -1 where there is none, which adds no cost.
        ``choice`` is not used.
        """
        log_q = torch.log_softmax(logits, -1)
        q = torch.exp(log_q, out=logits)
        if not self.next_token:
            ratio = log_q.sub_(aim)
            cost = torch.linalg.vecdot(q, ratio)
            q.mul_(ratio.sub_(cost.unsqueeze(1)))
            return cost
        assert emitted is not None
        known, token = (emitted >= 0).to(q.dtype), emitted.clamp(min=0).unsqueeze(1)
        surprise = -log_q.gather(1, token).squeeze(1) * known
        ratio = log_q.sub_(aim)
        cost = torch.linalg.vecdot(q, ratio)
        q.mul_(ratio.sub_((cost - known).unsqueeze(1)))
        q.scatter_add_(1, token, -known.unsqueeze(1))
        return cost + surprise


@dataclass(frozen=True)
class Objective:
    """A member of the family.

    Args:
        direction: of the divergence on the accepted path.
        discard_weight: lambda; with 0 the discard term is not computed.
        discard_top_k: k.
    """

    direction: Direction = "forward"
    discard_weight: float = 0.0
    discard_top_k: int = 10

    @property
    def accepted(self) -> Forward | Reverse:
        """Cost of a row of the accepted path."""
        if self.direction == "forward":
            return Forward()
        return Reverse(next_token=self.direction == "reverse+next-token")

    @property
    def discard(self) -> Forward:
        """Cost of a row of a rejected branch."""
        return Forward(self.discard_top_k)
