"""What a lesson solved for, written into an EAGLE-3 layer: which weight holds what is in lesson.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Attention, Eagle3Draft
from aurora_vllm.learner.induction import Induction, rms

SAMPLE_ROWS = 256  # to find a typical size on
MARGIN = 40.0  # attention score of a row with itself: it outweighs the rows of the same token too


@dataclass
class Solution:
    """Rows are inputs: guess_0 = a A + e M + c W, guess_k = n(guess_k-1) N + e M + c W. Where codes stand all is 0."""

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
    """Write it in place, into everything but the final norm and ``lm_head``.

    Heads that hold no value of a channel stay silent without induction: their output projection is zero.

    Args:
        draft: at least one key-value head for every ``head_dim`` channels, and as many query heads.
        induction: what the other heads are to do, if anything.
        scale: typical size of each auxiliary channel. [num_aux * H]
        size: typical RMS of a guess, with the codes beside it.
        aux: samples of the inputs, over ``scale``. [n, num_aux * H]
        copies: samples of what induction heads bring. [n, H]
    """
    hidden, dim = draft.config.hidden_size, draft.config.head_dim
    own = -(-hidden // dim)
    recursion = solution.guess - size * torch.eye(hidden)
    fc, radius = _first_step(solution.aux, recursion, aux, size, induction)
    token = solution.token.clone()
    if induction is not None:
        # A step's codes go, and what the next one's are expected to be comes.
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
    """The first heads: in them a row finds itself."""
    generator = torch.Generator().manual_seed(0)
    for head in range(heads):
        rows = torch.linalg.qr(torch.randn(hidden, min(dim, hidden), generator=generator)).Q.T  # [D, H], orthonormal
        block = slice(head * dim, head * dim + len(rows))
        for part in (attn.q_proj, attn.k_proj):
            part.weight[block, :hidden] = rows * (MARGIN / dim**0.5) ** 0.5


def _first_step(
    aux: torch.Tensor, recursion: torch.Tensor, a: torch.Tensor, size: float, induction: Induction | None
) -> tuple[torch.Tensor, float]:
    """F with  u + n(u) R = a A  for u = a F, where n(u) = u / rms(u); codes stand beside it.

    With rms(u) = rho for all rows this is linear, F = A (I + R / rho)^-1, and rho has to agree with the u it leads to.

    Args:
        aux: A [num_aux * H, H]; recursion: R [H, H]; a: [n, num_aux * H]; size: where rho's search begins.

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
    for _ in range(12):  # rms(u) falls with rho; the two end within a thousandth of each other
        rho = (low * high) ** 0.5
        if float(rms(solve(rho, guesses, sample_codes)).median()) > rho:
            low = rho
        else:
            high = rho
    return solve(high, aux, codes), high
