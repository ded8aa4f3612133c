"""Normal equations of the lesson's regression, in two blocks, so that what stays the same is factorised once.

Inputs are the auxiliary states, which stand in the first step's rows only, and the *rest*: the guess before, tokens and
copies. Later steps add rows to the rest alone, so of

    [ A   B ]          A = L L^T          S = C - X^T X,  X = L^-1 B        (the Schur complement of A)
    [ B^T C ]

only S changes from round to round. Leaving inputs out at the end of the rest leaves a leading part of everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 512  # columns


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """total += x^T x, of which only what lies on and below the diagonal is kept up, in blocks: a Cholesky factorisation
    reads no more. total: [n, n], x: [rows, n]."""
    for start in range(0, len(total), BLOCK):
        total[start:, start : start + BLOCK].addmm_(x[:, start:].T, x[:, start : start + BLOCK])


def ridge_factor(x: torch.Tensor, ridge: float) -> torch.Tensor:
    """Cholesky factor of x^T x and a ridge. x: [n, X] -> [X, X], lower

    Args:
        ridge: relative to the mean of the diagonal.
    """
    normal = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    add_gram(normal, x)
    normal.diagonal().add_(ridge * normal.diagonal().mean() + 1e-6)
    return torch.linalg.cholesky(normal)


def regress(inputs: torch.Tensor, outputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression; ridge as in :func:`ridge_factor`. [n, X], [n, Y] -> [X, Y]"""
    return torch.cholesky_solve(inputs.T @ outputs, ridge_factor(inputs, ridge))


class NormalEquations:
    """Of the first step's rows, collected piece by piece.

    Args:
        width: auxiliary inputs.
        rest: other inputs; the first ``hidden`` of them, the guess before, are zero here.
        hidden: outputs.
    """

    def __init__(self, width: int, rest: int, hidden: int) -> None:
        self._hidden = hidden
        self._aux, self._aux_right = torch.zeros(width, width), torch.zeros(width, hidden)
        self._rest, self._rest_right = torch.zeros(rest, rest), torch.zeros(rest, hidden)
        self._cross = torch.zeros(width, rest)
        self.count = 0  # rows

    def add(self, aux: torch.Tensor, others: torch.Tensor, wanted: torch.Tensor) -> None:
        """aux: [n, width], others: [n, rest - hidden], wanted: [n, hidden]."""
        hidden = self._hidden
        add_gram(self._aux, aux)
        add_gram(self._rest[hidden:, hidden:], others)
        self._cross[:, hidden:].addmm_(aux.T, others)
        self._aux_right.addmm_(aux.T, wanted)
        self._rest_right[hidden:].addmm_(others.T, wanted)
        self.count += len(aux)

    def leave_out(self, rest: int) -> None:
        """Keep the first so many of the other inputs."""
        self._rest, self._rest_right = self._rest[:rest, :rest].clone(), self._rest_right[:rest].clone()
        self._cross = self._cross[:, :rest].clone()

    def eliminate(self, ridge: float, guess_ridge: float, persistence: float) -> Eliminated:
        """With the auxiliary inputs solved for.

        Args:
            ridge: of every input but the guess, relative to inputs of unit size.
            guess_ridge, persistence: the guess' own, and the multiple of the identity its weights are drawn to.
        """
        hidden, count = self._hidden, self.count
        aux, rest, right = self._aux.clone(), self._rest.clone(), self._rest_right.clone()
        aux.diagonal().add_(ridge * count)
        rest.diagonal()[:hidden].add_(guess_ridge * count)
        rest.diagonal()[hidden:].add_(ridge * count)
        right[:hidden].diagonal().add_(guess_ridge * count * persistence)
        lower = torch.linalg.cholesky(aux)
        cross, solved = (torch.linalg.solve_triangular(lower, x, upper=False) for x in (self._cross, self._aux_right))
        rest.addmm_(cross.T, cross, alpha=-1.0)
        right.addmm_(cross.T, solved, alpha=-1.0)
        return Eliminated(lower, cross, solved, rest, right)


@dataclass(frozen=True)
class Eliminated:
    """What is left to solve."""

    _lower: torch.Tensor  # L
    _cross: torch.Tensor  # X
    _solved: torch.Tensor  # L^-1 of the auxiliary inputs' right side
    _rest: torch.Tensor  # S, what lies on and below the diagonal
    _right: torch.Tensor

    def solve(
        self, more: torch.Tensor | None = None, right: torch.Tensor | None = None, rest: int | None = None
    ) -> torch.Tensor:
        """Weights, [width + rest, hidden].

        Args:
            more, right: of later steps' rows, added to the rest's part; ``more`` as :func:`add_gram` leaves it.
            rest: with only the first so many of the other inputs.
        """
        cross = self._cross[:, :rest]
        left, wanted = self._rest[:rest, :rest], self._right[:rest]
        if more is not None and right is not None:
            left, wanted = left + more, wanted + right
        others = torch.cholesky_solve(wanted, torch.linalg.cholesky(left))
        aux = torch.linalg.solve_triangular(self._lower.T, self._solved - cross @ others, upper=True)
        return torch.cat([aux, others])
