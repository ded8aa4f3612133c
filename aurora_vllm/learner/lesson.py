"""A day-0 draft's first lesson, in closed form: least squares on a few requests instead of hundreds of gradient steps.

What a draft has to learn first is linear: from the target's auxiliary states a_t and the embedding e of the next token,
guess the target's state y one position further on; from that guess and the token after it, the next state; and so on.
Ridge regression solves this exactly, on prompt rows as well as on answers:

    y_{t+1}    ~  A a_t          + M e_{t+1}   + W c_{t}       the first draft token
    y_{t+1+k}  ~  N n(guess_k-1) + M e_{t+1+k} + W c_{t+k}     the k-th after it; n is RMSNorm without a weight

c is what induction heads retrieve: the token that followed the last time the context was similar (induction.py).

An EAGLE-3 layer computes  u + o(attention of v [e, n(u)]) + MLP(.),  with u = fc(a) in the first step and the layer's
own previous output in later ones. So the solution is written into its weights like this:

    q, k   in the first heads, as many as one value per channel takes, the same orthonormal projection of e: a row
           attends to itself. Further heads, if any, are induction heads
    v, o   v = [M, N - r I],  o = I; r is the typical size of a guess, and cancels the residual path in later steps.
           Induction heads: W, up to the rank that fits
    fc     A, corrected for the effect of N - r I in the first step, and codes
    MLP    its last projection starts at zero: no effect at first, and free to learn
    norm   one number, chosen so that the guess's size matches its certainty; zero in code channels
    head   lm_head's own rows, rotated so that they read y as before (readout.py)

y is the target's last hidden state divided by its final norm's weight, and rotated to make room for codes. Induction
costs channels, so it is tested on the newest requests: unless first guesses on them, learned from the others, are
better with it, its heads have no effect (o = 0) and no channel is used for codes.

Measured by hand: SmolLM2-135M and GSM8K, one seed, K=3, 32 unseen prompts, acceptance length without and with
induction: 1.45 and 1.54 after 3,190 rows (5 s of one CPU), 1.56 and 1.72 after 12,409 (11 s), 1.58 and 1.76 after
16,555 (12 s). With codes of tokens instead of states: 1.52, 1.68 and 1.72. A day-0 draft has 1.04.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.dual_equations import DualEquations
from aurora_vllm.learner.induction import LOUDNESS, Induction, code_channels, make_induction, rms, unit
from aurora_vllm.learner.installation import Solution, install
from aurora_vllm.learner.lesson_rows import hold_out, pieces_of, windows
from aurora_vllm.learner.lesson_shape import unknowns_of
from aurora_vllm.learner.loss import STEP_DECAY
from aurora_vllm.learner.normal_equations import NormalEquations, Penalties
from aurora_vllm.learner.readout import Readout
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory

STEPS = 3  # y_{t+1} .. y_{t+3}; further ones follow the same recursion
# A guess resembles the next one, so N is pulled towards a multiple of the identity. That also keeps fc's correction
# solvable.
PENALTIES = Penalties(ridge=0.03, guess=1.0, persistence=0.7)
# Rows of all steps per input, below which the dual form is used. Measured by hand, with 2,048 channels (12,288 inputs):
# 20 CPU seconds and 0.8 GB instead of 117 and 2.1 for 1,024 rows, 34 and 1.3 instead of 86 and 2.2 for 2,048; 99 s for
# 3,840, as long as normal equations.
DUAL_BELOW = 0.67
# A row with states this many times the typical size is taken for an attention sink. At the start of a sequence they are
# 50 to 150 times as large (SmolLM2), which says nothing about the next state, and whose squares drown the ridge in
# float32.
FAR_OFF = 10.0

_Equations = NormalEquations | DualEquations


@dataclass(frozen=True)
class _Features:
    """Inputs and outputs of the regression for n rows t, without attention sinks."""

    aux: torch.Tensor  # [n, num_aux * H], each auxiliary state divided by its typical size
    tokens: list[torch.Tensor]  # STEPS of [n, H]: embeddings of the tokens at t+1, t+2, ..., scaled to unit size
    copies: list[torch.Tensor]  # STEPS of [n, H]: what induction heads retrieve there; of [n, 0] without them
    states: list[torch.Tensor]  # STEPS of [n, H]: y there


class Lesson:
    """Solves for a day-0 draft and writes the solution into it.

    Args:
        draft: a day-0 draft (its final norm is the target's), float32; changed only at the end of :meth:`run`.
        head: the target's embedding and lm_head.
        induction: whether to add induction heads, where there is room for them and they help.
    """

    def __init__(self, draft: Eagle3Draft, head: TargetHead, induction: bool = True) -> None:
        self._draft, self._head = draft, head
        self._final_norm = draft.norm.weight.detach().clone()
        self._hidden = draft.config.hidden_size
        self._width = draft.config.num_aux_hidden_states * self._hidden
        self._may_copy = induction and unknowns_of(draft.config) > self._width + 2 * self._hidden
        self._scale = torch.ones(self._width)
        self._basis = torch.eye(self._hidden)  # target's last state over its norm's weight -> the draft's hidden state
        self._readout = Readout(draft, head, self._final_norm)
        self._induction: Induction | None = None

    def start_over(self) -> None:
        """The draft's weights are not those of the last lesson: the next one takes ``lm_head`` from the target."""
        self._readout.start_over()

    @torch.no_grad()
    def run(self, trajectories: Sequence[Trajectory]) -> Iterator[None]:
        """Yields between pieces of work, so that the caller can keep to its share of the CPU.

        Args:
            trajectories: the newest traffic; those of at most ``STEPS`` rows, and those with a state that is not
                finite, are left out.

        Raises:
            RuntimeError: there is no solution in float32 (``torch.linalg.LinAlgError``). The draft is unchanged.
        """
        usable = [one for one in trajectories if len(one.token_ids) > STEPS and one.is_finite]
        if not usable:
            return
        self._prepare(usable)
        yield
        learned, held_out = (pieces_of(part) for part in hold_out(usable))
        pieces, hidden = learned + held_out, self._hidden
        rest = (3 if self._may_copy else 2) * hidden
        equations = self._equations(sum(len(one.token_ids) for one in usable), rest)
        for number, piece in enumerate(pieces):
            if self._induction is not None and number == len(learned):
                if not self._copying_helps(equations, held_out):
                    self._induction = None
                    equations.leave_out(2 * hidden)
                yield
            features = self._features(piece)
            equations.add(features.aux, torch.cat([features.tokens[0], features.copies[0]], 1), features.states[0])
            yield
        eliminated = equations.eliminate()
        del equations  # they take as much memory again
        yield
        solution = self._solution(eliminated.solve())
        yield
        for round_ in range(1, STEPS):  # round k uses the guesses of the steps before k
            later = eliminated.later()
            for piece in pieces:
                features = self._features(piece)
                for k, estimate in enumerate(self._guesses(solution, features, round_), start=1):
                    x = torch.cat([self._normed(estimate), features.tokens[k], features.copies[k]], 1)
                    weight = STEP_DECAY ** (k / 2)
                    later.add(x * weight, features.states[k] * weight)
                yield
            solution = self._solution(later.solve())
            yield
        if not all(bool(torch.isfinite(weights).all()) for weights in vars(solution).values()):
            raise RuntimeError("the solution is not finite")
        self._install(solution, self._features(pieces[-1]))

    def _prepare(self, trajectories: Sequence[Trajectory]) -> None:
        """Typical sizes of the states and, with induction, codes: needed before anything is solved."""
        states = torch.cat([one.aux.float() for one in trajectories[:8]]).unflatten(1, (-1, self._hidden))
        # The median over rows, since a sequence's first token is an outlier.
        self._scale = rms(states).median(0).values.repeat_interleave(self._hidden)
        self._induction, self._basis = None, torch.eye(self._hidden)
        if self._may_copy:
            size = code_channels(self._hidden, self._draft.config.head_dim)
            self._induction = make_induction(trajectories, self._scale, self._head, self._final_norm, size)
            self._basis = self._induction.basis

    def _equations(self, rows: int, rest: int) -> _Equations:
        if STEPS * rows < DUAL_BELOW * (self._width + rest):
            return DualEquations(self._hidden, PENALTIES)
        return NormalEquations(self._width, rest, self._hidden, PENALTIES)

    def _copying_helps(self, equations: _Equations, held_out: Sequence[Sequence[Trajectory]]) -> bool:
        """Whether induction heads, which take channels, improve first guesses on held-out rows.

        Args:
            equations: of the first step, over the other rows.
        """
        eliminated = equations.eliminate()
        either = self._solution(eliminated.solve())
        neither = self._split_up(eliminated.solve(rest=2 * self._hidden))
        weight = torch.linalg.vector_norm(self._readout.rows(self._basis), dim=0)
        errors = torch.zeros(2)
        for piece in held_out:
            features = self._features(piece)
            for i, solution in enumerate((either, neither)):
                guess = features.aux @ solution.aux + features.tokens[0] @ solution.token
                guess += features.copies[0][:, : len(solution.copy)] @ solution.copy
                errors[i] += ((guess - features.states[0]) * weight).square().sum()
        return bool(errors[0] < errors[1])

    def _solution(self, solved: torch.Tensor) -> Solution:
        """The solution from the solved weights, [inputs, H], which are zeroed in code channels."""
        if self._induction is not None:
            width = self._induction.width
            solved[:, :width] = 0.0
            solved[self._width : self._width + width] = 0.0
        return self._split_up(solved)

    def _split_up(self, solved: torch.Tensor) -> Solution:
        hidden = self._hidden
        return Solution(*solved.split([self._width, hidden, hidden, len(solved) - self._width - 2 * hidden]))

    def _features(self, piece: Sequence[Trajectory]) -> _Features:
        aux, tokens, copies, states = [], [], [], []
        for one in piece:
            scaled, embeddings = one.aux.float() / self._scale, unit(self._head.embed(one.token_ids))
            near = rms(scaled[:-STEPS]) < FAR_OFF
            aux.append(scaled[:-STEPS][near])
            tokens.append([x[near] for x in windows(embeddings[1:], STEPS)])
            found = self._induction.bring(scaled, embeddings) if self._induction is not None else embeddings[1:, :0]
            copies.append([x[near] for x in windows(found, STEPS)])
            after = one.last[1:].float() / self._final_norm @ self._basis
            states.append([x[near] for x in windows(after, STEPS)])
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
        """RMS of the draft's hidden state for these guesses, codes included. [n, H] -> [n]"""
        code = self._induction.strength if self._induction is not None else 0.0
        return ((estimate.square().sum(-1) + code**2) / self._hidden).sqrt()

    def _normed(self, estimate: torch.Tensor) -> torch.Tensor:
        return self._gain * estimate / self._sizes(estimate).unsqueeze(-1).clamp(min=1e-6)

    @property
    def _gain(self) -> float:
        """Factor that makes a normed guess of unit size again, although there are codes in the state."""
        return (1.0 + LOUDNESS**2) ** 0.5 if self._induction is not None else 1.0

    def _install(self, solution: Solution, sample: _Features) -> None:
        """Write the solution into the draft, in place. sample: rows for measuring typical sizes."""
        states = sample.states[0]
        size = float(self._sizes(next(self._guesses(solution, sample, 1))).mean())
        solution = replace(solution, guess=solution.guess * self._gain)
        install(self._draft, solution, self._induction, self._scale, size, sample.aux, sample.copies[0])
        width = self._induction.width if self._induction is not None else 0
        self._readout.install(self._basis, width, size / float(rms(states[:, width:]).mean()))
