"""Copying, the part of the lesson that is not linear: what followed this token when it last stood here?

Answers repeat their prompt and themselves. On GSM8K a small target's next token is, for 40 % of all rows, the one that
followed the same two tokens before; a draft without attention to its context finds few of them. Transformers learn
induction heads for this (Olsson et al., "In-context Learning and Induction Heads", 2022), which takes two layers and
many tokens; an EAGLE-3 draft has one layer, but reads states of a target that has the other. So the heads are written
down, and the regression only has to find out how much to make of what they bring:

    row s stands for the target's state at position s, and reads the token x_{s+1}
    key    code(x_s), code(x_{s-1})      linear in the auxiliary states, by regression
    query  code(x_{t+1}), code(x_t)      linear in the token's embedding, and as the key
    value  the embedding of x_{s+1}

A code is a short vector for each token: few channels of the draft's hidden state carry both codes from ``fc`` to the
attention and, from one step to the next, to the attention of that. The final norm blots them out. They are loud beside
everything else in that state, because the layer's norm divides each row by its size: keys of small states, and so
attention to them, would otherwise be larger than meant, and what the heads bring another thing than the regression was
told (on SmolLM2 three quarters of the attention lay elsewhere). In a head codes lie in the channels RoPE turns slowest,
for a match may be far away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Attention
from aurora_vllm.learner.normal_equations import add_gram
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

MATCH = 16.0  # attention score of a row that follows this token, ...
MATCH_BEFORE = 10.0  # ... and what it gains where the token before agrees too
LOUDNESS = 1.0  # of a code beside all of the target's state, as vectors. Twice as much gained nothing
PROBE_RIDGE = 0.003  # relative to inputs of unit size
SAMPLE_ROWS = 8192  # the newest ones, to find the codes and where to read them
FLOOR = 0.1  # of the median variance: what whitening takes the smallest ones for


@dataclass(frozen=True)
class Induction:
    """How tokens are coded, C channels each."""

    channels: torch.Tensor  # int64 [2, C]: of the hidden state, for this token's code and for the one before
    token: torch.Tensor  # [H, C]: embedding of unit size -> code
    here: torch.Tensor  # [num_aux * H, C]: scaled auxiliary states -> code of the token at this position
    before: torch.Tensor  # [num_aux * H, C]: -> code of the token before it
    strength: float  # length of a code in the hidden state

    @property
    def size(self) -> int:
        """C."""
        return self.channels.shape[1]

    def bring(self, aux: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """What the heads find, one attention pattern for all.

        Args:
            aux: [T, num_aux * H], scaled, of a sequence from its start.
            embeddings: [T, H], of its tokens, of unit size.

        Returns:
            [T - 1, H]: row t's weighted mean of the embeddings at s+1, s <= t.
        """
        here, before = (_at_most_one(aux[:-1] @ probe) for probe in (self.here, self.before))
        query = torch.cat([MATCH * (embeddings[1:] @ self.token), MATCH_BEFORE * here], 1)
        scores = query @ torch.cat([here, before], 1).T
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(-1) @ embeddings[1:]

    def install(
        self, attn: Attention, first: int, dim: int, copy: torch.Tensor, found: torch.Tensor, read: float
    ) -> None:
        """Write the heads: one pattern of attention for all, and in each a part of W's largest directions.

        Args:
            attn: of the draft; its heads from ``first`` on are written, of ``dim`` channels each.
            copy: W, what is made of what they bring. [H, H]
            found: c, samples of what they bring. [n, H]
            read: what a normed state's code channels are times this is the code.
        """
        hidden, size, rows = len(copy), self.size, len(attn.q_proj.weight)
        here, before = (hidden + channels for channels in self.channels)
        of_this = torch.arange(dim // 2 - size, dim // 2)  # RoPE pairs channel i with D/2 + i; the last turn slowest
        of_before = of_this + dim // 2
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
            projection.weight[first * dim :] = 0.0
        for start in range(first * dim, rows, dim):
            this, previous = start + of_this, start + of_before
            attn.q_proj.weight[this, :hidden] = self.token.T * MATCH * dim**0.5
            attn.q_proj.weight[previous, here] = read * MATCH_BEFORE * dim**0.5
            attn.k_proj.weight[this, here] = read
            attn.k_proj.weight[previous, before] = read
        rank = min(rows - first * dim, hidden)
        output = found @ copy
        directions = torch.linalg.eigh(output.T @ output).eigenvectors[:, -rank:]
        block = slice(first * dim, first * dim + rank)
        attn.v_proj.weight[block, :hidden] = (copy @ directions).T
        attn.o_proj.weight[:, block] = directions


def make_induction(
    trajectories: Sequence[Trajectory],
    scale: torch.Tensor,
    head: TargetHead,
    final_norm: torch.Tensor,
    weight: torch.Tensor,
    size: int,
) -> Induction:
    """Codes for the tokens of this traffic, and where to read them.

    Args:
        trajectories: of at least two rows each.
        scale: [num_aux * H], typical size of each auxiliary channel.
        head: the target's frozen ends.
        final_norm: [H], weight of the target's final norm.
        weight: [H], how much a unit of each channel of the target's last state moves the logits.
        size: C.
    """
    last = torch.cat([one.last.float() for one in trajectories[:8]])
    trajectories = _newest(trajectories)
    tokens = torch.cat([one.token_ids for one in trajectories])
    follows = torch.cat([torch.arange(len(one.token_ids)) > 0 for one in trajectories])
    aux = torch.cat([one.aux.float() for one in trajectories]) / scale
    embeddings = unit(head.embed(tokens))
    codes = embeddings @ _projection(unit(head.embed(tokens.unique())), size)
    codes = codes / codes.norm(dim=1, keepdim=True).clamp(min=1e-6)
    # A sequence's first row has no token before it, and its state is far off.
    both = torch.cat([codes[follows], codes[:-1][follows[1:]]], 1)
    here, before = regress(aux[follows], both, PROBE_RIDGE).split(size, dim=1)
    return Induction(
        channels=(rms(last.T) * weight).argsort()[: 2 * size].view(2, size),  # those that move the logits least
        token=regress(embeddings, codes, PROBE_RIDGE),
        here=here,
        before=before,
        strength=LOUDNESS * float(rms(last / final_norm).median()) * last.shape[1] ** 0.5,
    )


def _newest(trajectories: Sequence[Trajectory]) -> Sequence[Trajectory]:
    """Those of about SAMPLE_ROWS rows together, at least one."""
    rows, first = 0, len(trajectories)
    while first and rows < SAMPLE_ROWS:
        first -= 1
        rows += len(trajectories[first].token_ids)
    return trajectories[first:]


def _projection(embeddings: torch.Tensor, size: int) -> torch.Tensor:
    """A random one that spreads these tokens evenly. [n, H] -> [H, size]"""
    variances, directions = torch.linalg.eigh(torch.cov(embeddings.T))
    spread = variances.clamp(min=float(variances.median()) * FLOOR).clamp(min=1e-12).rsqrt()
    hidden = len(directions)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.linalg.qr(torch.randn(hidden, size, generator=generator)).Q
    return directions @ (spread[:, None] * (directions.T @ chosen))


def regress(inputs: torch.Tensor, outputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression. [n, X], [n, Y] -> [X, Y]"""
    normal = torch.zeros(inputs.shape[1], inputs.shape[1])
    add_gram(normal, inputs)
    normal.diagonal().add_(ridge * len(inputs))
    return torch.cholesky_solve(inputs.T @ outputs, torch.linalg.cholesky(normal))


def unit(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a weight. Sizes here are far above a draft's epsilon."""
    return x / rms(x).unsqueeze(-1).clamp(min=1e-6)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


def _at_most_one(codes: torch.Tensor) -> torch.Tensor:
    """A sequence's first states are far off, and so are their codes; the layer's norm takes care of it there."""
    return codes / codes.norm(dim=1, keepdim=True).clamp(min=1.0)
