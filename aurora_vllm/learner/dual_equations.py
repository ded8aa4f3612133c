"""The lesson's regression in dual form (ridge.py): one unknown per row and output, instead of per input.

    weights  =  R^-1 X^T (X R^-1 X^T + n)^-1 Y          R: each input's ridge, n: rows of the first step

The same solution as :mod:`normal_equations`, at a cost proportional to the number of inputs instead of its cube: for
early lessons, with few rows. The rows are kept, because nothing is accumulated.
"""

from __future__ import annotations

import torch

from aurora_vllm.learner.normal_equations import Penalties
from aurora_vllm.learner.ridge import add_gram


class DualEquations:
    """Rows of the first step, collected piece by piece; see :class:`NormalEquations`."""

    def __init__(self, hidden: int, penalties: Penalties) -> None:
        self._hidden, self._penalties = hidden, penalties
        self._aux: list[torch.Tensor] = []
        self._others: list[torch.Tensor] = []
        self._wanted: list[torch.Tensor] = []

    def add(self, aux: torch.Tensor, others: torch.Tensor, wanted: torch.Tensor) -> None:
        """aux: [n, width], others: [n, rest - hidden], wanted: [n, hidden]."""
        self._aux.append(aux)
        self._others.append(others)
        self._wanted.append(wanted)

    def leave_out(self, rest: int) -> None:
        """Keep only the first ``rest`` of the inputs other than the auxiliary ones."""
        self._others = [others[:, : rest - self._hidden].clone() for others in self._others]

    def eliminate(self) -> DualEquations:
        """What is left to solve; in this form, everything."""
        return self

    def solve(self, rest: int | None = None) -> torch.Tensor:
        """Weights, [width + rest, hidden].

        Args:
            rest: use only this many of the inputs other than the auxiliary ones.
        """
        others = [x if rest is None else x[:, : rest - self._hidden] for x in self._others]
        return self._solve(others, [], [])

    def later(self) -> LaterRows:
        """For solving with rows of later steps, in addition to the first one's."""
        return LaterRows(self)

    def _solve(self, others: list[torch.Tensor], rest: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
        """others: inputs of the first step; rest, wanted: of later ones. The equations are multiplied by the ridge."""
        hidden, penalties = self._hidden, self._penalties
        ease = (penalties.ridge / penalties.guess) ** 0.5
        aux = torch.cat(self._aux)
        guess = torch.cat([aux[:0, :hidden], *(x[:, :hidden] for x in rest)])
        beside = torch.cat([*others, *(x[:, hidden:] for x in rest)])
        outputs, count = torch.cat([*self._wanted, *wanted]), len(aux)
        outputs[count:].sub_(guess, alpha=penalties.persistence)
        guess *= ease
        gram = torch.zeros(len(beside), len(beside))
        add_gram(gram, beside.T)
        add_gram(gram[:count, :count], aux.T)
        add_gram(gram[count:, count:], guess.T)
        gram.diagonal().add_(penalties.ridge * count)
        unknowns = torch.cholesky_solve(outputs, torch.linalg.cholesky(gram))
        of_guess = guess.T @ unknowns[count:] * ease
        of_guess.diagonal().add_(penalties.persistence)
        return torch.cat([aux.T @ unknowns[:count], of_guess, beside.T @ unknowns])


class LaterRows:
    """Rows of later steps."""

    def __init__(self, equations: DualEquations) -> None:
        self._equations = equations
        self._rest: list[torch.Tensor] = []
        self._wanted: list[torch.Tensor] = []

    def add(self, rest: torch.Tensor, wanted: torch.Tensor) -> None:
        """rest: [n, rest], beginning with the previous guess; wanted: [n, hidden]."""
        self._rest.append(rest)
        self._wanted.append(wanted)

    def solve(self) -> torch.Tensor:
        """Weights, [width + rest, hidden]."""
        return self._equations._solve(self._equations._others, self._rest, self._wanted)
