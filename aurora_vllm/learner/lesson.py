"""A day-0 draft's first lesson, in closed form: least squares from a few requests, not hundreds of gradient steps.

What a draft has to find out first is linear: from the target's auxiliary states a_t and the embedding e of the token
that was emitted, guess the state y the target will have one position further on, and from that guess and the token
after it the next. Ridge regression solves this exactly, on prompt rows as well as on answers:

    y_{t+1}    ~  A a_t          + M e_{t+1}          the first draft
    y_{t+1+k}  ~  N n(guess_k-1) + M e_{t+1+k}        the k-th after it; n is RMSNorm without a weight

An EAGLE-3 layer computes  u + o(attention of v [e, n(u)]) + MLP(.),  with u = fc(a) in the first step and the layer's
own last output after it. So the solution is written into its weights like this:

    q, k   the same orthonormal projection of e in every head: a row finds itself (and rows of the same token)
    v, o   v = [M, N - r I],  o = I; r is the typical size of a guess, which cancels the residual path in later steps
    fc     A, corrected for what N - r I does to it in the first step
    MLP    its last projection starts at zero: silent, and free to learn
    norm   the target's, scaled by how much less certain a guess is

With y the target's last hidden state over its final norm's weight, the draft's final norm and lm_head are the target's
own. Measured on SmolLM2-135M, HumanEval, K=3, 24 unseen prompts: 40 requests (11,600 rows) in 6 s of one CPU give an
acceptance length of 1.50, where a day-0 draft has 1.04 and 60 optimizer steps (17 s) gave 1.25.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

STEPS = 3  # y_{t+1} .. y_{t+3}: further ones follow the same recursion
STEP_DECAY = 0.8  # weight of a step beside the one before, as in the training objective
RIDGE = 0.03  # relative to inputs of unit size
PERSISTENCE = 0.7  # what N is drawn to: a guess says something about the next one too. Keeps fc's correction solvable
PERSISTENCE_RIDGE = 1.0
MARGIN = 16.0  # attention score of a row with itself; e^16 outweighs any context
PIECE_ROWS = 2048  # rows of one piece of work
MAX_UNKNOWNS = 12_288  # of one column of the regression: its normal equations are 600 MB of float32


def fits(hidden_size: int, num_heads: int, head_dim: int, num_aux: int) -> bool:
    """Whether a draft of this shape can hold the solution (one value per channel), and it can be solved for."""
    return num_heads * head_dim >= hidden_size and (num_aux + 2) * hidden_size <= MAX_UNKNOWNS


def is_due(draft: Eagle3Draft) -> bool:
    """Whether this is a day-0 draft that nothing was taught yet, of a shape that can take the lesson."""
    config, weight = draft.config, draft.fc.weight
    hidden = config.hidden_size
    untaught = bool((weight[:, :-hidden] == 0).all()) and torch.equal(weight[:, -hidden:], torch.eye(hidden))
    return (
        untaught
        and _is_plain(config)
        and fits(hidden, config.num_attention_heads, config.head_dim, config.num_aux_hidden_states)
    )


def _is_plain(config: Eagle3Config) -> bool:
    plain = not (config.norm_before_fc or config.fc_norm or config.norm_output or config.norm_before_residual)
    alike = config.num_key_value_heads == config.num_attention_heads
    return plain and alike and config.target_hidden_size == config.hidden_size


@dataclass
class _Solution:
    """Rows are inputs: guess_0 = a A + e M, guess_k = n(guess_k-1) N + e M."""

    aux: torch.Tensor  # A: [num_aux * H, H]
    guess: torch.Tensor  # N: [H, H]
    token: torch.Tensor  # M: [H, H]


@dataclass(frozen=True)
class _Features:
    """Inputs and outputs of the regression for n rows t."""

    aux: torch.Tensor  # [n, num_aux * H], each auxiliary state over its typical size
    tokens: list[torch.Tensor]  # STEPS of [n, H]: embeddings of the tokens at t+1, t+2, ..., of unit size
    states: list[torch.Tensor]  # STEPS of [n, H]: the target's last hidden states there, over its final norm's weight


class Lesson:
    """Solves for a day-0 draft and writes the solution into it.

    Args:
        draft: day-0 draft (its final norm is the target's), float32; changed by :meth:`run`, at the very end.
        head: the target's frozen ends.
    """

    def __init__(self, draft: Eagle3Draft, head: TargetHead) -> None:
        self._draft, self._head = draft, head
        self._final_norm = draft.norm.weight.detach().clone()
        self._hidden = draft.config.hidden_size
        self._num_aux = draft.config.num_aux_hidden_states
        self._scale = torch.ones(self._num_aux * self._hidden)

    @torch.no_grad()
    def run(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """Yields between pieces of work, so that the caller can keep to its share of the CPU.

        Args:
            trajectories: what was served; those of no more than ``STEPS`` rows are left out.
        """
        usable = [one for one in trajectories if len(one.token_ids) > STEPS]
        if not usable:
            return
        self._scale = self._typical_sizes(usable)
        pieces = _pieces(usable)
        hidden, width = self._hidden, self._num_aux * self._hidden
        guess = slice(width, width + hidden)
        count = sum(len(one.token_ids) - STEPS for one in usable)
        first = torch.zeros(width + 2 * hidden, width + 2 * hidden)  # step 0, the same in every round
        first_right = torch.zeros(width + 2 * hidden, hidden)
        solution = None
        for round_ in range(STEPS):  # round k knows the guesses of the steps below k
            left, right = torch.zeros(2 * hidden, 2 * hidden), torch.zeros(2 * hidden, hidden)
            for piece in pieces:
                features = self._features(piece)
                if round_ == 0:
                    x = torch.cat(
                        [features.aux, features.aux.new_zeros(len(features.aux), hidden), features.tokens[0]], 1
                    )
                    first.addmm_(x.T, x)
                    first_right.addmm_(x.T, features.states[0])
                for k, estimate in enumerate(_guesses(solution, features, round_), start=1):
                    x = torch.cat([_unit(estimate), features.tokens[k]], 1)
                    left.addmm_(x.T, x, alpha=STEP_DECAY**k)
                    right.addmm_(x.T, features.states[k], alpha=STEP_DECAY**k)
                yield
            normal, wanted = first.clone(), first_right.clone()
            normal[width:, width:] += left
            wanted[width:] += right
            ridge = torch.full((len(normal),), RIDGE * count)
            ridge[guess] = PERSISTENCE_RIDGE * count
            normal.diagonal().add_(ridge)
            wanted[guess].diagonal().add_(PERSISTENCE_RIDGE * count * PERSISTENCE)
            solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(normal))
            solution = _Solution(solved[:width], solved[guess], solved[guess.stop :])
            yield
        assert solution is not None
        self._install(solution, self._features(pieces[-1]))

    def _features(self, piece: Sequence[Trajectory]) -> _Features:
        aux, tokens, states = [], [], []
        for one in piece:
            aux.append(one.aux[:-STEPS].float() / self._scale)
            tokens.append(_windows(_unit(self._head.embed(one.token_ids))))
            states.append(_windows(one.last.float() / self._final_norm))
        return _Features(
            torch.cat(aux), *([torch.cat(step) for step in zip(*x, strict=True)] for x in (tokens, states))
        )

    def _typical_sizes(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Of each auxiliary state: the median over rows, since a sequence's first token is far off. [num_aux * H]"""
        states = torch.cat([one.aux.float() for one in trajectories[:8]]).unflatten(1, (-1, self._hidden))
        return _rms(states).median(0).values.repeat_interleave(self._hidden)

    def _install(self, solution: _Solution, sample: _Features) -> None:
        """Write the solution into the draft, in place. sample: rows to measure typical sizes on."""
        draft, hidden = self._draft, self._hidden
        estimate = next(_guesses(solution, sample, 1))
        size = _rms(estimate).mean()
        recursion = solution.guess - size * torch.eye(hidden)

        layer, attn = draft.midlayer, draft.midlayer.self_attn
        layer.input_layernorm.weight.fill_(1.0)
        layer.hidden_norm.weight.fill_(1.0)
        layer.mlp.down_proj.weight.zero_()
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj):
            projection.weight.zero_()
        generator = torch.Generator().manual_seed(0)
        dim = draft.config.head_dim
        for head in range(draft.config.num_attention_heads):
            rows = torch.linalg.qr(
                torch.randn(hidden, min(dim, hidden), generator=generator)
            ).Q.T  # [D, H], orthonormal
            block = slice(head * dim, head * dim + len(rows))
            for part in (attn.q_proj, attn.k_proj):
                part.weight[block, :hidden] = rows * (MARGIN / dim**0.5) ** 0.5
        attn.v_proj.weight[:hidden] = torch.cat([solution.token, recursion]).T
        attn.o_proj.weight[:, :hidden] = torch.eye(hidden)
        draft.fc.weight.copy_((_first_step(solution.aux, recursion, sample.aux, float(size)) / self._scale[:, None]).T)
        draft.norm.weight.copy_(self._final_norm * (size / _rms(sample.states[0]).mean()))


def _guesses(solution: _Solution | None, features: _Features, count: int) -> Iterator[torch.Tensor]:
    """The guesses of steps 0 .. count-1, each [n, H]; none before the first solution."""
    estimate = torch.empty(0)
    for k in range(count if solution is not None else 0):
        assert solution is not None
        before = features.aux @ solution.aux if k == 0 else _unit(estimate) @ solution.guess
        estimate = before + features.tokens[k] @ solution.token
        yield estimate


def _first_step(aux: torch.Tensor, recursion: torch.Tensor, a: torch.Tensor, size: float) -> torch.Tensor:
    """F with  u + n(u) R = a A  for u = a F, where n(u) = u / rms(u).

    With rms(u) = rho for all rows this is linear, F = A (I + R / rho)^-1, and rho has to agree with the u it leads to.

    Args:
        aux: A [num_aux * H, H]; recursion: R [H, H]; a: [n, num_aux * H]; size: where rho's search begins.
    """
    identity = torch.eye(len(recursion))

    def solve(rho: float) -> torch.Tensor:
        return torch.linalg.solve(identity + recursion / rho, aux, left=False)

    low, high = size, 64.0 * size
    for _ in range(20):  # rms(u) falls with rho
        rho = (low * high) ** 0.5
        if float(_rms(a @ solve(rho)).mean()) > rho:
            low = rho
        else:
            high = rho
    return solve(high)


def _pieces(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbours together, about PIECE_ROWS rows each."""
    pieces: list[list[Trajectory]] = [[]]
    rows = 0
    for one in trajectories:
        if pieces[-1] and rows + len(one.token_ids) > PIECE_ROWS:
            pieces.append([])
            rows = 0
        pieces[-1].append(one)
        rows += len(one.token_ids)
    return pieces


def _windows(x: torch.Tensor) -> list[torch.Tensor]:
    """[T, H] -> what stands 1, 2, ... STEPS rows behind each of the first T - STEPS rows."""
    count = len(x) - STEPS
    return [x[1 + k : 1 + k + count] for k in range(STEPS)]


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


def _unit(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without a weight. Sizes here are far above a draft's epsilon."""
    return x / _rms(x).unsqueeze(-1).clamp(min=1e-6)
