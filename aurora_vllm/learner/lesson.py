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
           itself. The others, where the draft has more, are induction heads
    v, o   v = [M, N - r I],  o = I; r is the typical size of a guess, which cancels the residual path in later steps.
           Induction heads: W, of the rank they have room for
    fc     A, corrected for what N - r I does to it in the first step, and the two codes
    MLP    its last projection starts at zero: silent, and free to learn
    norm   the target's, scaled by how much less certain a guess is, and zero where codes stand

With y the target's last hidden state over its final norm's weight, the draft's final norm and lm_head are the target's
own. Induction costs channels, so the newest requests decide whether it stays: where first guesses on them are no better
with it, learned from the others, its heads are silent (o = 0) and no channel is a code's.

Measured on SmolLM2-135M, K=3, 32 unseen prompts, one seed, acceptance length without and with induction: GSM8K 1.49 and
1.53 after 3,100 rows, 1.60 and 1.72 after 12,400; HumanEval 1.37 and 1.39 after 3,300 rows, 1.46 and 1.55 after 12,400.
12,400 rows take 8 s of one CPU. A day-0 draft has 1.04.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.induction import LOUDNESS, Induction, make_induction, rms, unit
from aurora_vllm.learner.installation import Solution, install
from aurora_vllm.learner.lesson_shape import unknowns_of
from aurora_vllm.learner.normal_equations import Eliminated, NormalEquations, add_gram
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

STEPS = 3  # y_{t+1} .. y_{t+3}: further ones follow the same recursion
STEP_DECAY = 0.8  # weight of a step beside the one before, as in the training objective
RIDGE = 0.03  # relative to inputs of unit size
PERSISTENCE = 0.7  # what N is drawn to: a guess says something about the next one too. Keeps fc's correction solvable
PERSISTENCE_RIDGE = 1.0
HELD_OUT = 0.2  # of the rows, the newest: what decides about induction heads
PIECE_ROWS = 2048  # rows of one piece of work


@dataclass(frozen=True)
class _Features:
    """Inputs and outputs of the regression for n rows t."""

    aux: torch.Tensor  # [n, num_aux * H], each auxiliary state over its typical size
    tokens: list[torch.Tensor]  # STEPS of [n, H]: embeddings of the tokens at t+1, t+2, ..., of unit size
    copies: list[torch.Tensor]  # STEPS of [n, H]: what induction heads bring there; of [n, 0] without them
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
        self._width = draft.config.num_aux_hidden_states * self._hidden
        self._scale = torch.ones(self._width)
        self._induction: Induction | None = None

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
        learned, held_out = (_pieces(part) for part in _split(usable))
        pieces, hidden = learned + held_out, self._hidden
        rest = unknowns_of(self._draft.config) - self._width
        normal = NormalEquations(self._width, rest, hidden)  # of the first step
        for number, piece in enumerate(pieces):
            if self._induction is not None and number == len(learned):
                if not self._copying_helps(normal, held_out):
                    self._induction = None
                    rest = 2 * hidden
                    normal.leave_out(rest)
                yield
            features = self._features(piece)
            normal.add(features.aux, torch.cat([features.tokens[0], features.copies[0]], 1), features.states[0])
            yield
        eliminated = self._eliminate(normal)
        yield
        solution = self._solution(eliminated.solve())
        yield
        for round_ in range(1, STEPS):  # round k knows the guesses of the steps below k
            left, right = torch.zeros(rest, rest), torch.zeros(rest, hidden)
            for piece in pieces:
                features = self._features(piece)
                for k, estimate in enumerate(self._guesses(solution, features, round_), start=1):
                    x = torch.cat([self._normed(estimate), features.tokens[k], features.copies[k]], 1)
                    x *= STEP_DECAY ** (k / 2)
                    add_gram(left, x)
                    right.addmm_(x.T, features.states[k], alpha=STEP_DECAY ** (k / 2))
                yield
            solution = self._solution(eliminated.solve(left, right))
            yield
        self._install(solution, self._features(pieces[-1]))

    def _prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """What has to be known of the traffic before anything is solved."""
        states = torch.cat([one.aux.float() for one in trajectories[:8]]).unflatten(1, (-1, self._hidden))
        # The median over rows, since a sequence's first token is far off.
        self._scale = rms(states).median(0).values.repeat_interleave(self._hidden)
        self._induction = None
        if unknowns_of(self._draft.config) > self._width + 2 * self._hidden:
            size = self._draft.config.head_dim // 4
            norms = self._column_norms()
            self._induction = make_induction(trajectories, self._scale, self._head, self._final_norm, norms, size)

    def _column_norms(self) -> torch.Tensor:
        """How much a unit of each channel moves the draft's logits. [H]"""
        return torch.linalg.vector_norm(self._draft.lm_head.weight, dim=0)

    def _copying_helps(self, normal: NormalEquations, held_out: Sequence[Sequence[Trajectory]]) -> bool:
        """Whether induction heads, with the channels they take, make first guesses better where none was learned from.

        Args:
            normal: of the first step, over other rows.
        """
        eliminated = self._eliminate(normal)
        either = self._solution(eliminated.solve())
        neither = self._split_up(eliminated.solve(rest=2 * self._hidden))
        weight = self._column_norms() * self._final_norm
        errors = torch.zeros(2)
        for piece in held_out:
            features = self._features(piece)
            for i, solution in enumerate((either, neither)):
                guess = features.aux @ solution.aux + features.tokens[0] @ solution.token
                guess += features.copies[0][:, : len(solution.copy)] @ solution.copy
                errors[i] += ((guess - features.states[0]) * weight).square().sum()
        return bool(errors[0] < errors[1])

    def _eliminate(self, normal: NormalEquations) -> Eliminated:
        return normal.eliminate(RIDGE, PERSISTENCE_RIDGE, PERSISTENCE)

    def _solution(self, solved: torch.Tensor) -> Solution:
        """Of the solved weights; where codes stand they have no say. [inputs, H]"""
        if self._induction is not None:
            codes = self._induction.channels.flatten()
            solved[:, codes] = 0.0
            solved[self._width + codes] = 0.0
        return self._split_up(solved)

    def _split_up(self, solved: torch.Tensor) -> Solution:
        hidden = self._hidden
        return Solution(*solved.split([self._width, hidden, hidden, len(solved) - self._width - 2 * hidden]))

    def _features(self, piece: Sequence[Trajectory]) -> _Features:
        aux, tokens, copies, states = [], [], [], []
        for one in piece:
            scaled, embeddings = one.aux.float() / self._scale, unit(self._head.embed(one.token_ids))
            aux.append(scaled[:-STEPS])
            tokens.append(_windows(embeddings[1:]))
            found = self._induction.bring(scaled, embeddings) if self._induction is not None else embeddings[1:, :0]
            copies.append(_windows(found))
            states.append(_windows(one.last[1:].float() / self._final_norm))
        return _Features(
            torch.cat(aux), *([torch.cat(step) for step in zip(*x, strict=True)] for x in (tokens, copies, states))
        )

    def _guesses(self, solution: Solution, features: _Features, count: int) -> Iterator[torch.Tensor]:
        """The guesses of steps 0 .. count-1, each [n, H]."""
        estimate = torch.empty(0)
        for k in range(count):
            before = features.aux @ solution.aux if k == 0 else self._normed(estimate) @ solution.guess
            estimate = before + features.tokens[k] @ solution.token + features.copies[k] @ solution.copy
            yield estimate

    def _sizes(self, estimate: torch.Tensor) -> torch.Tensor:
        """RMS of the draft's hidden state at these guesses: a code stands beside each. [n, H] -> [n]"""
        code = self._induction.strength if self._induction is not None else 0.0
        return ((estimate.square().sum(-1) + code**2) / self._hidden).sqrt()

    def _normed(self, estimate: torch.Tensor) -> torch.Tensor:
        return self._gain * estimate / self._sizes(estimate).unsqueeze(-1).clamp(min=1e-6)

    @property
    def _gain(self) -> float:
        """What makes a normed guess of unit size again, beside a code."""
        return (1.0 + LOUDNESS**2) ** 0.5 if self._induction is not None else 1.0

    def _install(self, solution: Solution, sample: _Features) -> None:
        """Write the solution into the draft, in place. sample: rows to measure typical sizes on."""
        draft, states = self._draft, sample.states[0]
        size = float(self._sizes(next(self._guesses(solution, sample, 1))).mean())
        solution = replace(solution, guess=solution.guess * self._gain)
        install(draft, solution, self._induction, self._scale, size, sample.aux, sample.copies[0])
        weight = self._final_norm.clone()
        if self._induction is not None:
            codes = self._induction.channels.flatten()
            weight[codes] = 0.0
            states = states.index_fill(1, codes, 0.0)
        draft.norm.weight.copy_(weight * (size / rms(states).mean()))


def _split(trajectories: Sequence[Trajectory]) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The older ones, and the newest of about HELD_OUT of the rows together. One alone is an older one."""
    wanted = HELD_OUT * sum(len(one.token_ids) for one in trajectories)
    first = len(trajectories)
    while first > 1 and wanted > 0:
        first -= 1
        wanted -= len(trajectories[first].token_ids)
    return trajectories[:first], trajectories[first:]


def _pieces(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbours together, about PIECE_ROWS rows each."""
    pieces: list[list[Trajectory]] = []
    rows = 0
    for one in trajectories:
        if not pieces or rows + len(one.token_ids) > PIECE_ROWS:
            pieces.append([])
            rows = 0
        pieces[-1].append(one)
        rows += len(one.token_ids)
    return pieces


def _windows(x: torch.Tensor) -> list[torch.Tensor]:
    """[T - 1, H] -> what stands 0, 1, ... STEPS - 1 rows behind each of the first T - STEPS rows."""
    count = len(x) + 1 - STEPS
    return [x[k : k + count] for k in range(STEPS)]
