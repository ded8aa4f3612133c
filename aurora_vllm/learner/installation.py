"""Writes the solution of a lesson into an EAGLE-3 layer; lesson.py describes which weight holds what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Attention, Eagle3Draft
from aurora_vllm.learner.induction import Induction, rms

SAMPLE_ROWS = 256  # for measuring typical sizes
MARGIN = 40.0  # attention score of a row with itself, large enough to outweigh other rows with the same token


@dataclass
class Solution:
    """Inputs are row vectors: guess_0 = a A + e M + c W, guess_k = n(guess_k-1) N + e M + c W. Zero in code
    channels."""

    aux: torch.Tensor  # A: [num_aux * H, H]
    guess: torch.Tensor  # N: [H, H]
    token: torch.Tensor  # M: [H, H]
    copy: torch.Tensor  # W: [H, H], or [0, H] without induction heads


def install(
    draft: Eagle3Draft,
    solution: Solution,
    induction: Induction | None,
    scale: torch.Tensor,
    size: float,
    aux: torch.Tensor,
    copies: torch.Tensor,
) -> None:
    """Write a solution in place, into all weights but the final norm and ``lm_head``.

    Heads beyond those needed for one value per channel have no effect without induction: their output projection is 0.

    Args:
        draft: with at least one key-value head for every ``head_dim`` channels, and as many query heads.
        induction: for the further heads, if any.
        scale: typical size of each auxiliary channel. [num_aux * H]
        size: typical RMS of a guess together with the codes.
        aux: samples of the inputs, divided by ``scale``. [n, num_aux * H]
        copies: samples of what induction heads retrieve. [n, H]
    """
    hidden, dim = draft.config.hidden_size, draft.config.head_dim
    own = -(-hidden // dim)
    recursion = solution.guess - size * torch.eye(hidden)
    fc, radius = _first_step(solution.aux, recursion, aux, size, induction)
    token = solution.token.clone()
    if induction is not None:
        # A step's codes are replaced by the expected ones of the next step.
        width = induction.width
        old, new = induction.next_codes.split([width, hidden])
        recursion[:width, :width] = radius * (old - torch.eye(width))
        token[:, :width] = induction.strength * new

    layer, attn = draft.midlayer, draft.midlayer.self_attn
    layer.input_layernorm.weight.fill_(1.0)
    layer.hidden_norm.weight.fill_(1.0)
    layer.mlp.down_proj.weight.zero_()
    attn.o_proj.weight.zero_()
    for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
        projection.weight[: own * dim] = 0.0
    _install_self(attn, own, dim, hidden)
    attn.v_proj.weight[:hidden] = torch.cat([token, recursion]).T
    attn.o_proj.weight[:, :hidden] = torch.eye(hidden)
    if induction is not None:
        induction.install(attn, own, dim, solution.copy, copies, radius / induction.strength)
    draft.fc.weight.copy_((fc / scale[:, None]).T)


def _install_self(attn: Attention, heads: int, dim: int, hidden: int) -> None:
    """The first heads: in these each row attends to itself."""
    generator = torch.Generator().manual_seed(0)
    for head in range(heads):
        rows = torch.linalg.qr(torch.randn(hidden, min(dim, hidden), generator=generator)).Q.T  # [D, H], orthonormal
        block = slice(head * dim, head * dim + len(rows))
        for part in (attn.q_proj, attn.k_proj):
            part.weight[block, :hidden] = rows * (MARGIN / dim**0.5) ** 0.5


def _first_step(
    aux: torch.Tensor, recursion: torch.Tensor, a: torch.Tensor, size: float, induction: Induction | None
) -> tuple[torch.Tensor, float]:
    """F such that  u + n(u) R = a A  for u = a F, where n(u) = u / rms(u) and u includes the codes.

    With rms(u) = rho for all rows this is linear, F = A (I + R / rho)^-1; rho is chosen to agree with the resulting u.

    Args:
        aux: A [num_aux * H, H]; recursion: R [H, H]; a: [n, num_aux * H]; size: where the search for rho begins.

    Returns:
        F, and rho.
    """
    identity = torch.eye(len(recursion))
    codes = induction.strength * induction.codes if induction is not None else aux[:, :0]
    sample = a[:SAMPLE_ROWS]
    guesses, sample_codes = sample @ aux, sample @ codes

    def solve(rho: float, wanted: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        found = torch.linalg.solve(identity + recursion / rho, wanted, left=False)
        found[:, : beside.shape[1]] = beside
        return found

    low, high = size, 64.0 * size
    for _ in range(12):  # bisection, since rms(u) falls with rho; they end within a thousandth of each other
        rho = (low * high) ** 0.5
        if float(rms(solve(rho, guesses, sample_codes)).median()) > rho:
            low = rho
        else:
            high = rho
    return solve(high, aux, codes), high
