"""Ridge regression with an unknown for each input or for each row: one solution, in all its forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.learner import ridge
from aurora_vllm.learner.dual_equations import DualEquations
from aurora_vllm.learner.normal_equations import NormalEquations, Penalties
from aurora_vllm.learner.ridge import Ridge, add_gram

HIDDEN, WIDTH = 5, 12


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 1.0), st.integers(0, 99))
def test_weights_minimise_what_ridge_regression_minimises(rows: int, inputs: int, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, inputs, generator=generator), torch.randn(rows, 3, generator=generator)
    fitted = Ridge(x, strength)
    assert fitted.penalty == pytest.approx(strength * float(x.square().sum(0).mean()), rel=1e-3, abs=1e-5)
    weights = fitted.weights(y)
    gradient = x.T @ (x @ weights - y) + fitted.penalty * weights
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-3, rtol=0)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_gram_matrix_in_blocks_is_the_whole_one_below_the_diagonal(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    total = torch.zeros(columns, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge, "BLOCK", 2)
        add_gram(total, x)
    torch.testing.assert_close(total.tril(), (x.T @ x).tril())


@given(
    first=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    later=st.lists(st.integers(1, 6), max_size=3),
    penalties=st.builds(Penalties, st.floats(0.02, 0.5), st.floats(0.1, 2.0), st.floats(0.0, 1.0)),
    leaves_out=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_forms_of_a_lessons_regression_have_one_solution(
    first: list[int], later: list[int], penalties: Penalties, leaves_out: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    rest = 3 * HIDDEN
    normal, dual = NormalEquations(WIDTH, rest, HIDDEN, penalties), DualEquations(HIDDEN, penalties)
    for rows in first:
        piece = some(rows, WIDTH), some(rows, rest - HIDDEN), some(rows, HIDDEN)
        for equations in (normal, dual):
            equations.add(*piece)
    # Asked without the copies, as a lesson does to judge them; this must leave everything as it was.
    torch.testing.assert_close(
        normal.eliminate().solve(rest=2 * HIDDEN), dual.eliminate().solve(rest=2 * HIDDEN), atol=2e-3, rtol=0
    )
    if leaves_out:
        rest = 2 * HIDDEN
        for equations in (normal, dual):
            equations.leave_out(rest)
    normal_left, dual_left = normal.eliminate(), dual.eliminate()
    torch.testing.assert_close(normal_left.solve(), dual_left.solve(), atol=2e-3, rtol=0)
    for _ in range(2):  # one round's rows are not the next one's
        sums, kept = normal_left.later(), dual_left.later()
        for rows in later:
            step = some(rows, rest), some(rows, HIDDEN)
            sums.add(*step)
            kept.add(*step)
        solved = sums.solve()
        assert solved.shape == (WIDTH + rest, HIDDEN)
        torch.testing.assert_close(solved, kept.solve(), atol=2e-3, rtol=0)


def test_the_guess_is_drawn_to_a_part_of_the_one_before() -> None:
    dual = DualEquations(HIDDEN, Penalties(0.1, 0.5, 0.7))
    dual.add(torch.randn(2, WIDTH), torch.randn(2, HIDDEN), torch.randn(2, HIDDEN))
    torch.testing.assert_close(dual.solve()[WIDTH : WIDTH + HIDDEN], 0.7 * torch.eye(HIDDEN))
