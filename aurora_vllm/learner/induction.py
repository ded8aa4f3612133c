"""Induction heads, the non-linear part of the lesson: they find what followed the last time the context was similar.

Answers repeat their prompt and themselves. On GSM8K a small target's next token is, for 40 % of all rows, the one that
followed the same two tokens before; a draft without attention to its context finds few of them. Transformers learn
induction heads for this (Olsson et al., "In-context Learning and Induction Heads", 2022), which takes two layers and
many tokens. An EAGLE-3 draft has one layer, but it reads the states of a target that has the others. So the heads are
constructed, and the regression only has to find the weight of what they retrieve:

    row s has the target's state a_s at position s, and reads the token x_{s+1}
    key    code(a_s): characterises the context at s
    query  the expected code(a_{t+1}), predicted from a_t and the token x_{t+1}
    value  the embedding of x_{s+1}

A code is a short vector, a linear function of the states. It is found by canonical correlation analysis (Hotelling,
"Relations Between Two Sets of Variates", 1936): the directions that are best predicted one position ahead. Random
projections of token embeddings did worse as codes: measured by hand, 50 % instead of 53 % of the first tokens proposed
for unseen GSM8K answers were right (a regression on 16,000 rows, 32 channels both times; 43 % without heads).

Codes occupy the first channels of the draft's hidden state, from ``fc`` to the attention and from one step to the next;
the final norm zeroes them. To make room, the state is rotated (``basis``) so that these channels would hold the
directions in which the target's last state varies least: leaving out 64 of 576 then costs nothing, while leaving out
the 32 channels that move the logits least costs 1.8 % of the guesses. Codes are large compared with the rest of the
state. The layer's norm divides each row by its size, so otherwise keys of small states, and attention to them, would be
larger than intended, and the heads would retrieve something else than in the regression. Within a head, codes are in
the channels that RoPE rotates most slowly, because a match may be far away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Attention
from aurora_vllm.learner.lesson_rows import newest
from aurora_vllm.learner.ridge import Ridge, regress
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

MATCH = 16.0  # attention score of a row with the expected code, for a query and a key of typical size
LOUDNESS = 1.0  # length of a code relative to that of the target's state. Twice as much gained nothing
RIDGE = 0.03  # see ridge.Ridge


@dataclass(frozen=True)
class Induction:
    """Maps from states to codes: C channels for the key, and C for the state's part of the query."""

    basis: torch.Tensor  # [H, H], orthogonal: target's last state -> draft's hidden state, whose first 2C are for codes
    codes: torch.Tensor  # [num_aux * H, 2C]: scaled auxiliary states -> codes, of typical length 1
    token: torch.Tensor  # [H, C]: the next token's embedding, of unit size -> its part of the query
    match: float  # factor from query . key to the attention score
    next_codes: torch.Tensor  # [2C + H, 2C]: these codes and that embedding -> codes of the next state
    strength: float  # length of codes in the hidden state

    def bring(self, aux: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """What the heads retrieve; all have the same attention pattern.

        Args:
            aux: [T, num_aux * H], scaled auxiliary states of a sequence from its start.
            embeddings: [T, H], of its tokens, scaled to unit size.

        Returns:
            [T - 1, H]: row t's weighted mean of the embeddings at s+1, s <= t.
        """
        keys, queries = _as_normed(aux[:-1] @ self.codes).chunk(2, dim=1)
        scores = self.match * (queries + embeddings[1:] @ self.token) @ keys.T
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ embeddings[1:]

    @property
    def width(self) -> int:
        """2C: channels of the hidden state that hold codes."""
        return self.codes.shape[1]

    def install(
        self, attn: Attention, first: int, dim: int, copy: torch.Tensor, found: torch.Tensor, read: float
    ) -> None:
        """Write the heads: all get the same attention pattern, and each a part of W's largest directions.

        Args:
            attn: the draft's; its heads from ``first`` on are written, of ``dim`` channels each.
            copy: W, the weights of what they retrieve. [H, H]
            found: c, samples of what they retrieve. [n, H]
            read: factor that turns codes in a normed state into codes of typical length 1.
        """
        hidden, rows = len(copy), len(attn.q_proj.weight)
        size = self.token.shape[1]
        # RoPE pairs channel i with D/2 + i, and rotates the last pairs most slowly: those get a code's first channels.
        slow = torch.arange(dim // 2 - 1, dim // 2 - 1 - size // 2, -1)
        slow = torch.stack([slow, slow + dim // 2], 1).flatten()
        key, query = torch.arange(hidden, hidden + self.width).chunk(2)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
            projection.weight[first * dim :] = 0.0
        for start in range(first * dim, rows, dim):
            attn.k_proj.weight[start + slow, key] = read
            attn.q_proj.weight[start + slow, query] = read * self.match * dim**0.5
            attn.q_proj.weight[start + slow, :hidden] = self.token.T * self.match * dim**0.5
        rank = min(rows - first * dim, hidden)
        output = found @ copy
        directions = torch.linalg.eigh(output.T @ output).eigenvectors[:, -rank:]
        block = slice(first * dim, first * dim + rank)
        attn.v_proj.weight[block, :hidden] = (copy @ directions).T
        attn.o_proj.weight[:, block] = directions


def code_channels(hidden: int, head_dim: int) -> int:
    """C, even: at most half of a head's channels, and both codes together at most an eighth of the hidden state."""
    return min(head_dim // 2, hidden // 16) // 2 * 2


def make_induction(
    trajectories: Sequence[Trajectory],
    scale: torch.Tensor,
    head: TargetHead,
    final_norm: torch.Tensor,
    size: int,
) -> Induction:
    """Find codes for the states of this traffic.

    Args:
        trajectories: of at least three rows each.
        scale: [num_aux * H], typical size of each auxiliary channel.
        head: the target's embedding and lm_head.
        final_norm: [H], weight of the target's final norm.
        size: C, even.
    """
    trajectories = newest(trajectories)
    states, tokens, after = [], [], []
    for one in trajectories:
        aux = one.aux[1:].float() / scale  # without a sequence's first state, which is an outlier
        states.append(aux[:-1])
        after.append(aux[1:])
        tokens.append(unit(head.embed(one.token_ids[2:])))
    known, embeddings, wanted = (torch.cat(x) for x in (states, tokens, after))
    query, key = canonical_pairs(torch.cat([known, embeddings], 1), wanted, size)
    key = key / _typical(wanted @ key)
    ahead, token = (query / _typical(known @ query[: len(scale)] + embeddings @ query[len(scale) :])).split(
        [len(scale), embeddings.shape[1]]
    )
    codes = torch.cat([key, ahead], 1)
    length = _typical(known @ codes)
    codes, token = codes / length, token / length
    last = torch.cat([one.last.float() for one in trajectories]) / final_norm
    return Induction(
        basis=torch.linalg.eigh(last.T @ last).eigenvectors,
        codes=codes,
        token=token,
        match=MATCH * length**2,
        next_codes=regress(torch.cat([_as_normed(known @ codes), embeddings], 1), wanted @ codes, RIDGE),
        strength=LOUDNESS * float(rms(last).median()) * last.shape[1] ** 0.5,
    )


def canonical_pairs(x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The directions of y that x predicts best, and their predictors. Not centred, because weights have no bias.

    Args:
        x: [n, X]; y: [n, Y].

    Returns:
        P [X, count] and Q [Y, count]: x P is the regression of y Q on x, so x P . y Q is large where y is as predicted.
    """
    of_x, of_y = Ridge(x, RIDGE), Ridge(y, RIDGE)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(y.shape[1], count + 16, generator=generator)
    for _ in range(5):  # subspace iteration: predict these directions from x, then regress the predictions on y
        directions = of_y.weights(x @ of_x.weights(y @ torch.linalg.qr(directions).Q))
    directions = torch.linalg.qr(directions).Q
    seen = y @ directions
    told = seen.T @ (x @ of_x.weights(seen))
    whole = seen.T @ seen + of_y.penalty * torch.eye(len(told))
    whiten = torch.linalg.inv(torch.linalg.cholesky(whole))
    axes = torch.linalg.eigh(whiten @ (told + told.T) @ whiten.T).eigenvectors.flip(1)
    key = directions @ (whiten.T @ axes[:, :count])
    return of_x.weights(y @ key), key


def _typical(codes: torch.Tensor) -> float:
    """Typical (median) length of a row."""
    return max(float(codes.norm(dim=1).median()), 1e-6)


def unit(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a weight; rows here are far larger than a draft's epsilon."""
    return x / rms(x).unsqueeze(-1).clamp(min=1e-6)


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over the last dimension. [..., H] -> [...]"""
    return x.square().mean(-1).sqrt()


def _as_normed(codes: torch.Tensor) -> torch.Tensor:
    """Codes as keys see them, after the layer's norm has divided each row by its size, codes included."""
    shares = codes.square().sum(1, keepdim=True) * LOUDNESS**2
    return codes * ((1.0 + LOUDNESS**2) / (1.0 + shares)).sqrt()
