"""Ridge regression in primal or dual form, whichever has fewer unknowns (inputs or rows)."""

from __future__ import annotations

import torch

BLOCK = 512  # columns


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x, by blocks on and below the diagonal only, which is all that a Cholesky factorisation reads.
    total: [n, n], x: [rows, n]."""
    for start in range(0, len(total), BLOCK):
        total[start:, start : start + BLOCK].addmm_(x[:, start:].T, x[:, start : start + BLOCK])


class Ridge:
    """Several regressions on the same inputs.

    With fewer rows than inputs, in dual form (Saunders, Gammerman and Vovk, "Ridge Regression Learning Algorithm in
    Dual Variables", 1998):

        (X^T X + r)^-1 X^T Y  =  X^T (X X^T + r)^-1 Y

    Args:
        inputs: X, [n, inputs].
        ridge: relative to the mean of the inputs' squares, summed over rows.
    """

    def __init__(self, inputs: torch.Tensor, ridge: float) -> None:
        self._inputs = inputs
        self._is_dual = len(inputs) < inputs.shape[1]
        self.penalty = ridge * float(inputs.square().sum()) / inputs.shape[1] + 1e-6  # r
        gram = torch.zeros(min(inputs.shape), min(inputs.shape), device=inputs.device)
        add_gram(gram, inputs.T if self._is_dual else inputs)
        gram.diagonal().add_(self.penalty)
        self._factor = torch.linalg.cholesky(gram)

    def weights(self, outputs: torch.Tensor) -> torch.Tensor:
        """[n, Y] -> [inputs, Y]"""
        if self._is_dual:
            return self._inputs.T @ torch.cholesky_solve(outputs, self._factor)
        return torch.cholesky_solve(self._inputs.T @ outputs, self._factor)


def regress(inputs: torch.Tensor, outputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """One regression; ridge as in :class:`Ridge`. [n, X], [n, Y] -> [X, Y]"""
    return Ridge(inputs, ridge).weights(outputs)
