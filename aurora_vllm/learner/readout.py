"""How ``lm_head`` reads the draft's hidden state, which each lesson rotates anew (lesson.py).

Its rows are rotated with the state, so that they read the target's state as before, with all that they were taught
since. The final norm zeroes the channels that codes take (induction.py); what ``lm_head`` knew of those directions is
gone, and the next lesson takes it from the target's.
"""

from __future__ import annotations

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.target import TargetHead


class Readout:
    """The final norm and ``lm_head`` of a draft, over its lessons.

    A *basis*, [H, H] and orthogonal, turns the target's last state, divided by its final norm's weight, into the
    draft's hidden state.

    Args:
        draft: a day-0 draft, float32; changed only by :meth:`install`.
        head: the target's embedding and lm_head.
        final_norm: [H], weight of the target's final norm.
    """

    def __init__(self, draft: Eagle3Draft, head: TargetHead, final_norm: torch.Tensor) -> None:
        self._draft, self._head, self._final_norm = draft, head, final_norm
        self._reads = torch.diag(final_norm)  # target's last state over its norm's weight -> what lm_head reads, ...
        self._unread = torch.zeros(len(final_norm), 0)  # ... and the directions of it that lm_head ignores

    def start_over(self) -> None:
        """The draft's weights are not those of the last lesson: take ``lm_head`` from the target."""
        self._reads = torch.zeros_like(self._reads)
        self._unread = torch.eye(len(self._reads))

    def rows(self, basis: torch.Tensor) -> torch.Tensor:
        """Rows of ``lm_head`` for hidden states of this basis. [draft vocabulary, H]"""
        rows = self._draft.lm_head.weight @ (self._reads.T @ basis)
        theirs = self._head.lm_head[self._draft.target_ids].float() * self._final_norm @ self._unread
        return rows.addmm_(theirs, self._unread.T @ basis)

    def install(self, basis: torch.Tensor, codes: int, norm: float) -> None:
        """Write both, in place, for hidden states of this basis.

        Args:
            codes: number of channels that hold codes, the first ones.
            norm: weight of the final norm, for rows as :meth:`rows` gives them.
        """
        weight, lm_head = self._draft.norm.weight, self._draft.lm_head.weight
        rows = self.rows(basis)
        gain = float(rows.norm() / lm_head.norm())  # keeps the length of lm_head's rows; the norm makes up for it
        lm_head.copy_(rows / gain)
        weight.fill_(gain * norm)
        weight[:codes] = 0.0
        self._unread = basis[:, :codes]
        self._reads = gain * basis
        self._reads[:, :codes] = 0.0
