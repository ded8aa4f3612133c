"""A day-0 draft's first lesson, in closed form: least squares from a few requests, not hundreds of gradient steps.

What a draft has to find out first is linear: from the target's auxiliary states a_t and the embedding e of the token
that was emitted, guess the state y the target will have one position further on, and from that guess and the token
after it the next. Ridge regression solves this exactly, on prompt rows as well as on answers:

    y_{t+1}    ~  A a_t          + M e_{t+1}   + W c_{t}       the first draft
    y_{t+1+k}  ~  N n(guess_k-1) + M e_{t+1+k} + W c_{t+k}     the k-th after it; n is RMSNorm without a weight

c is what induction heads bring, the token that followed the same tokens before (induction.py).

An EAGLE-3 layer computes  u + o(attention of v [e, n(u)]) + MLP(.),  with u = fc(a) in the first step and the layer's
own last output after it. So the solution is written into its weights like this:

    q, k   the same orthonormal projection of e in the first heads, as many as one value per channel takes: a row finds
           itself. The others, as many as the target has key-value heads, are induction heads
    v, o   v = [M, N - r I],  o = I; r is the typical size of a guess, which cancels the residual path in later steps.
           Induction heads: W, of the rank they have room for
    fc     A, corrected for what N - r I does to it in the first step, and the two codes
    MLP    its last projection starts at zero: silent, and free to learn
    norm   the target's, scaled by how much less certain a guess is, and zero where codes stand

With y the target's last hidden state over its final norm's weight, the draft's final norm and lm_head are the target's
own. Measured on SmolLM2-135M, GSM8K, K=3, 32 unseen prompts: 12,300 rows in 12 s of one CPU give an acceptance length
of 1.62 (without induction heads 7 s and 1.56), where a day-0 draft has 1.04.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aurora_vllm.learner.draft import Attention, Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.induction import MATCH, MATCH_BEFORE, Induction, make_induction, rms, unit
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

STEPS = 3  # y_{t+1} .. y_{t+3}: further ones follow the same recursion
STEP_DECAY = 0.8  # weight of a step beside the one before, as in the training objective
RIDGE = 0.03  # relative to inputs of unit size
PERSISTENCE = 0.7  # what N is drawn to: a guess says something about the next one too. Keeps fc's correction solvable
PERSISTENCE_RIDGE = 1.0
MARGIN = 40.0  # attention score of a row with itself: it outweighs the rows of the same token too
PIECE_ROWS = 2048  # rows of one piece of work
MAX_UNKNOWNS = 12_288  # of one column of the regression: its normal equations are 600 MB of float32


def heads_for(hidden_size: int, head_dim: int, key_value_heads: int, num_aux: int) -> int | None:
    """Heads a draft needs to hold the solution; None where it could not be solved for, or no number of heads is right.

    A multiple of the target's key-value heads, because vLLM wants the pages of one layer's KV cache to be a multiple of
    another's; and a divisor of the hidden size, because transformers reads no other Llama configuration.
    """
    if (num_aux + 3) * hidden_size > MAX_UNKNOWNS:
        return None
    own = -(-hidden_size // head_dim)
    least = (-(-own // key_value_heads) + 1) * key_value_heads
    allowed = range(least, 2 * max(own, key_value_heads) + 1, key_value_heads)
    return next((heads for heads in allowed if hidden_size % heads == 0), None)


def is_due(draft: Eagle3Draft) -> bool:
    """Whether this is a day-0 draft that nothing was taught yet, of a shape that can take the lesson."""
    config, weight = draft.config, draft.fc.weight
    hidden = config.hidden_size
    untaught = bool((weight[:, :-hidden] == 0).all()) and torch.equal(weight[:, -hidden:], torch.eye(hidden))
    room = config.num_attention_heads * config.head_dim >= hidden + config.head_dim
    solvable = (config.num_aux_hidden_states + 3) * hidden <= MAX_UNKNOWNS
    return untaught and _is_plain(config) and room and solvable


def _is_plain(config: Eagle3Config) -> bool:
    plain = not (config.norm_before_fc or config.fc_norm or config.norm_output or config.norm_before_residual)
    alike = config.num_key_value_heads == config.num_attention_heads
    return plain and alike and config.target_hidden_size == config.hidden_size


@dataclass
class _Solution:
    """Rows are inputs: guess_0 = a A + e M + c W, guess_k = n(guess_k-1) N + e M + c W. Where codes stand all is 0."""

    aux: torch.Tensor  # A: [num_aux * H, H]
    guess: torch.Tensor  # N: [H, H]
    token: torch.Tensor  # M: [H, H]
    copy: torch.Tensor  # W: [H, H]


@dataclass(frozen=True)
class _Features:
    """Inputs and outputs of the regression for n rows t."""

    aux: torch.Tensor  # [n, num_aux * H], each auxiliary state over its typical size
    tokens: list[torch.Tensor]  # STEPS of [n, H]: embeddings of the tokens at t+1, t+2, ..., of unit size
    copies: list[torch.Tensor]  # STEPS of [n, H]: what induction heads bring there
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
        self._code_size = 0.0  # of a code in the hidden state, as a vector
        self._induction: Induction

    @torch.no_grad()
    def run(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """Yields between pieces of work, so that the caller can keep to its share of the CPU.

        Args:
            trajectories: what was served; those of no more than ``STEPS`` rows are left out.
        """
        usable = [one for one in trajectories if len(one.token_ids) > STEPS]
        if not usable:
            return
        self._prepare(usable)
        yield
        pieces = _pieces(usable)
        hidden, width = self._hidden, self._num_aux * self._hidden
        guess = slice(width, width + hidden)
        unknowns = width + 3 * hidden
        count = sum(len(one.token_ids) - STEPS for one in usable)
        first, first_right = torch.zeros(unknowns, unknowns), torch.zeros(unknowns, hidden)  # step 0, in every round
        solution = None
        for round_ in range(STEPS):  # round k knows the guesses of the steps below k
            left, right = torch.zeros(3 * hidden, 3 * hidden), torch.zeros(3 * hidden, hidden)
            for piece in pieces:
                features = self._features(piece)
                if round_ == 0:
                    none = features.aux.new_zeros(len(features.aux), hidden)
                    x = torch.cat([features.aux, none, features.tokens[0], features.copies[0]], 1)
                    first.addmm_(x.T, x)
                    first_right.addmm_(x.T, features.states[0])
                for k, estimate in enumerate(self._guesses(solution, features, round_), start=1):
                    x = torch.cat([self._normed(estimate), features.tokens[k], features.copies[k]], 1)
                    left.addmm_(x.T, x, alpha=STEP_DECAY**k)
                    right.addmm_(x.T, features.states[k], alpha=STEP_DECAY**k)
                yield
            normal, wanted = first.clone(), first_right.clone()
            normal[width:, width:] += left
            wanted[width:] += right
            ridge = torch.full((unknowns,), RIDGE * count)
            ridge[guess] = PERSISTENCE_RIDGE * count
            normal.diagonal().add_(ridge)
            wanted[guess].diagonal().add_(PERSISTENCE_RIDGE * count * PERSISTENCE)
            solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(normal))
            solved[guess][:, self._codes] = solved[guess][self._codes] = 0.0
            solution = _Solution(*solved.split([width, hidden, hidden, hidden]))
            yield
        assert solution is not None
        self._install(solution, self._features(pieces[-1]))

    def _prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """What has to be known of the traffic before anything is solved."""
        states = torch.cat([one.aux.float() for one in trajectories[:8]]).unflatten(1, (-1, self._hidden))
        # The median over rows, since a sequence's first token is far off.
        self._scale = rms(states).median(0).values.repeat_interleave(self._hidden)
        size = self._draft.config.head_dim // 4
        self._induction = make_induction(trajectories, self._scale, self._head, self._final_norm, size)
        self._codes = self._induction.channels.flatten()
        last = torch.cat([one.last.float() / self._final_norm for one in trajectories[:8]])
        self._code_size = float(rms(last).median()) * size**0.5  # a channel of it is as large as any other

    def _features(self, piece: Sequence[Trajectory]) -> _Features:
        aux, tokens, copies, states = [], [], [], []
        for one in piece:
            scaled, embeddings = one.aux.float() / self._scale, unit(self._head.embed(one.token_ids))
            wanted = one.last.float() / self._final_norm
            wanted[:, self._codes] = 0.0
            aux.append(scaled[:-STEPS])
            tokens.append(_windows(embeddings[1:]))
            copies.append(_windows(self._induction.bring(scaled, embeddings)))
            states.append(_windows(wanted[1:]))
        return _Features(
            torch.cat(aux), *([torch.cat(step) for step in zip(*x, strict=True)] for x in (tokens, copies, states))
        )

    def _guesses(self, solution: _Solution | None, features: _Features, count: int) -> Iterator[torch.Tensor]:
        """The guesses of steps 0 .. count-1, each [n, H]; none before the first solution."""
        estimate = torch.empty(0)
        for k in range(count if solution is not None else 0):
            assert solution is not None
            before = features.aux @ solution.aux if k == 0 else self._normed(estimate) @ solution.guess
            estimate = before + features.tokens[k] @ solution.token + features.copies[k] @ solution.copy
            yield estimate

    def _sizes(self, estimate: torch.Tensor) -> torch.Tensor:
        """RMS of the draft's hidden state at these guesses: a code stands beside each. [n, H] -> [n]"""
        return ((estimate.square().sum(-1) + self._code_size**2) / self._hidden).sqrt()

    def _normed(self, estimate: torch.Tensor) -> torch.Tensor:
        return estimate / self._sizes(estimate).unsqueeze(-1)

    def _install(self, solution: _Solution, sample: _Features) -> None:
        """Write the solution into the draft, in place. sample: rows to measure typical sizes on."""
        draft, hidden, codes = self._draft, self._hidden, self._codes
        here = self._induction.channels[0]
        size = float(self._sizes(next(self._guesses(solution, sample, 1))).mean())
        recursion = solution.guess - size * torch.eye(hidden)
        fc, radius = self._first_step(solution.aux, recursion, sample.aux, size)
        recursion[codes] = 0.0
        recursion[codes, codes] = -radius  # a step's code goes, the next one's comes with M
        token = solution.token.clone()
        token[:, here] = self._code_size * self._induction.token

        layer, attn = draft.midlayer, draft.midlayer.self_attn
        layer.input_layernorm.weight.fill_(1.0)
        layer.hidden_norm.weight.fill_(1.0)
        layer.mlp.down_proj.weight.zero_()
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj):
            projection.weight.zero_()
        own = self._install_self(attn)
        attn.v_proj.weight[:hidden] = torch.cat([token, recursion]).T
        attn.o_proj.weight[:, :hidden] = torch.eye(hidden)
        self._install_induction(attn, solution.copy, sample.copies[0], own, radius)
        draft.fc.weight.copy_((fc / self._scale[:, None]).T)
        draft.norm.weight.copy_(self._final_norm * (size / rms(sample.states[0]).mean()))
        draft.norm.weight[codes] = 0.0

    def _install_self(self, attn: Attention) -> int:
        """Heads in which a row finds itself. Returns how many."""
        dim, hidden = self._draft.config.head_dim, self._hidden
        own = -(-hidden // dim)
        generator = torch.Generator().manual_seed(0)
        for head in range(own):
            rows = torch.linalg.qr(
                torch.randn(hidden, min(dim, hidden), generator=generator)
            ).Q.T  # [D, H], orthonormal
            block = slice(head * dim, head * dim + len(rows))
            for part in (attn.q_proj, attn.k_proj):
                part.weight[block, :hidden] = rows * (MARGIN / dim**0.5) ** 0.5
        return own

    def _install_induction(
        self, attn: Attention, copy: torch.Tensor, brought: torch.Tensor, own: int, radius: float
    ) -> None:
        """The other heads: one pattern of attention, and each a part of W's largest directions.

        Args:
            copy: W; brought: c, [n, H]; own: heads that are taken; radius: typical RMS of the first step's state.
        """
        dim, hidden, size = self._draft.config.head_dim, self._hidden, self._induction.size
        here, before = (hidden + channels for channels in self._induction.channels)
        of_this = torch.arange(dim // 2 - size, dim // 2)  # RoPE pairs channel i with D/2 + i; the last turn slowest
        of_before = of_this + dim // 2
        read = radius / self._code_size  # what a normed state's code channels are times this is the code
        for start in range(own * dim, len(attn.q_proj.weight), dim):
            this, previous = start + of_this, start + of_before
            attn.q_proj.weight[this, :hidden] = self._induction.token.T * MATCH * dim**0.5
            attn.q_proj.weight[previous, here] = read * MATCH_BEFORE * dim**0.5
            attn.k_proj.weight[this, here] = read
            attn.k_proj.weight[previous, before] = read
        rank = min(len(attn.q_proj.weight) - own * dim, hidden)
        output = brought @ copy
        directions = torch.linalg.eigh(output.T @ output).eigenvectors[:, -rank:]
        block = slice(own * dim, own * dim + rank)
        attn.v_proj.weight[block, :hidden] = (copy @ directions).T
        attn.o_proj.weight[:, block] = directions

    def _first_step(
        self, aux: torch.Tensor, recursion: torch.Tensor, a: torch.Tensor, size: float
    ) -> tuple[torch.Tensor, float]:
        """F with  u + n(u) R = a A  for u = a F, where n(u) = u / rms(u); codes stand beside it.

        With rms(u) = rho for all rows this is linear, F = A (I + R / rho)^-1, and rho has to agree with the u it leads
        to.

        Args:
            aux: A [num_aux * H, H]; recursion: R [H, H]; a: [n, num_aux * H]; size: where rho's search begins.

        Returns:
            F, and rho.
        """
        identity = torch.eye(len(recursion))
        here, before = self._induction.channels

        def solve(rho: float) -> torch.Tensor:
            found = torch.linalg.solve(identity + recursion / rho, aux, left=False)
            found[:, here] = self._code_size * self._induction.here
            found[:, before] = self._code_size * self._induction.before
            return found

        low, high = size, 64.0 * size
        for _ in range(20):  # rms(u) falls with rho
            rho = (low * high) ** 0.5
            if float(rms(a @ solve(rho)).median()) > rho:
                low = rho
            else:
                high = rho
        return solve(high), high


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
    """[T - 1, H] -> what stands 0, 1, ... STEPS - 1 rows behind each of the first T - STEPS rows."""
    count = len(x) + 1 - STEPS
    return [x[k : k + count] for k in range(STEPS)]
