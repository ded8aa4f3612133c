"""The lesson's regression as normal equations in two blocks, so that the constant part is factorised once.

Inputs are the auxiliary states, which occur in the first step's rows only, and the *rest*: previous guess, tokens and
copies. Later steps add rows to the rest only, so of

    [ A   B ]          A = L L^T          S = C - X^T X,  X = L^-1 B        (the Schur complement of A)
    [ B^T C ]

only S changes from round to round. Without the last inputs of the rest, a leading part of each matrix remains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_vllm.learner.ridge import add_gram


@dataclass(frozen=True)
class Penalties:
    """Penalties on weights, per row of the first step."""

    ridge: float  # on all weights but the guess's, for inputs of unit size
    guess: float  # on the guess's
    persistence: float  # the multiple of the identity that the guess's are pulled towards


class NormalEquations:
    """The first step's normal equations, accumulated piece by piece.

    Args:
        width: number of auxiliary inputs.
        rest: number of other inputs; the first ``hidden`` of them, the previous guess, are zero in this step.
        hidden: number of outputs.
        penalties: on the weights.
    """

    def __init__(self, width: int, rest: int, hidden: int, penalties: Penalties) -> None:
        self._hidden, self._penalties = hidden, penalties
        self._aux, self._aux_right = torch.zeros(width, width), torch.zeros(width, hidden)
        self._rest, self._rest_right = torch.zeros(rest, rest), torch.zeros(rest, hidden)
        self._cross = torch.zeros(width, rest)
        self._count = 0  # rows

    def add(self, aux: torch.Tensor, others: torch.Tensor, wanted: torch.Tensor) -> None:
        """aux: [n, width], others: [n, rest - hidden], wanted: [n, hidden]."""
        hidden = self._hidden
        add_gram(self._aux, aux)
        add_gram(self._rest[hidden:, hidden:], others)
        self._cross[:, hidden:].addmm_(aux.T, others)
        self._aux_right.addmm_(aux.T, wanted)
        self._rest_right[hidden:].addmm_(others.T, wanted)
        self._count += len(aux)

    def leave_out(self, rest: int) -> None:
        """Keep only the first ``rest`` of the other inputs."""
        self._rest, self._rest_right = self._rest[:rest, :rest].clone(), self._rest_right[:rest].clone()
        self._cross = self._cross[:, :rest].clone()

    def eliminate(self) -> Eliminated:
        """Eliminate the auxiliary inputs."""
        hidden, count, penalties = self._hidden, self._count, self._penalties
        aux, rest, right = self._aux.clone(), self._rest.clone(), self._rest_right.clone()
        aux.diagonal().add_(penalties.ridge * count)
        rest.diagonal()[:hidden].add_(penalties.guess * count)
        rest.diagonal()[hidden:].add_(penalties.ridge * count)
        right[:hidden].diagonal().add_(penalties.guess * count * penalties.persistence)
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

    def solve(self, rest: int | None = None) -> torch.Tensor:
        """Weights, [width + rest, hidden].

        Args:
            rest: use only this many of the other inputs.
        """
        return self._solve(self._rest[:rest, :rest], self._right[:rest])

    def later(self) -> LaterSteps:
        """For solving with rows of later steps, in addition to the first one's."""
        return LaterSteps(self)

    def _solve(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        others = torch.cholesky_solve(right, torch.linalg.cholesky(left))
        rest = self._solved - self._cross[:, : len(others)] @ others
        return torch.cat([torch.linalg.solve_triangular(self._lower.T, rest, upper=True), others])


class LaterSteps:
    """What is left to solve, with rows of later steps."""

    def __init__(self, eliminated: Eliminated) -> None:
        self._eliminated = eliminated
        self._left, self._right = eliminated._rest.clone(), eliminated._right.clone()

    def add(self, rest: torch.Tensor, wanted: torch.Tensor) -> None:
        """rest: [n, rest], beginning with the previous guess; wanted: [n, hidden]."""
        add_gram(self._left, rest)
        self._right.addmm_(rest.T, wanted)

    def solve(self) -> torch.Tensor:
        """Weights, [width + rest, hidden]."""
        return self._eliminated._solve(self._left, self._right)
