"""Evaluation: how many tokens would greedy speculation with this draft have gained on this trajectory?

Speculation with a chain of K draft tokens is replayed on the target's real answer, not approximated from top-1
accuracy. At a start row t the draft has seen the target's true states up to t, as in vLLM, and proposes tokens t+2 ..
t+1+K one after the other. As long as its proposals are right they *are* the trajectory's tokens, so one unroll over all
rows gives the accepted prefix for every start at once. Then the answer is walked through as by the server: from the
prompt's last row, each verification advances by the accepted tokens and the bonus token.

The measure is agreement with the token that followed. For a greedy request this is exactly vLLM's verdict. For a
sampled request vLLM accepts a greedy draft token with the target's probability of it, so the mean agrees but single
verdicts do not. Two drafts are compared by the same measure, and that is all a decision between them needs.

Used *prequentially*: a trajectory is scored before anything trains on it, so every sample is a test sample first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.loss import draft_choices
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory


@dataclass(frozen=True)
class Score:
    """Simulated speculation, on one trajectory or summed over several.

    ``accepted[i]`` is the number of verifications in which drafts 0..i were all accepted, as vLLM's
    ``spec_decode_num_accepted_tokens_per_pos`` counts.
    """

    steps: int  # verifications
    accepted: tuple[int, ...]  # K of them

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification, bonus token included; 1 without evidence."""
        return 1.0 + sum(self.accepted) / self.steps if self.steps else 1.0

    @property
    def tokens(self) -> int:
        """Tokens these verifications emitted."""
        return self.steps + sum(self.accepted)

    def __add__(self, other: Score) -> Score:
        return Score(self.steps + other.steps, tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True)))


@torch.no_grad()
def accepted_prefix(
    draft: Eagle3Draft, head: TargetHead, trajectory: Trajectory, length: int
) -> tuple[int, torch.Tensor]:
    """How many of K draft tokens would be accepted, for every row after which a verification could start.

    Only for rows whose K following tokens are all known: a chain that is cut off by the end of the answer would look
    worse than it is.

    Args:
        length: K.

    Returns:
        The first such row (the prompt's last, or row 0 if the prompt lies before the trajectory) and int64 [N] for it
        and the rows after it; N is 0 if the answer is too short.
    """
    rows = len(trajectory.token_ids)
    first = max(0, trajectory.prompt_length - 1 - trajectory.start)
    # The token after the last row is known as well, but is in no row. Draft token K-1 of a start t is judged by token
    # t+1+K.
    count = rows - 1 - length - first
    if count <= 0:
        return first, torch.zeros(0, dtype=torch.int64)
    asked = torch.zeros(1, rows, dtype=torch.bool)
    asked[0, first : first + count] = True
    batch = collate([trajectory], head.device)
    choices = draft_choices(draft, head, batch, length, asked.to(head.device)).cpu()[:, 0, first : first + count]
    truth = trajectory.token_ids.unfold(0, length, 1)[first + 2 :].T  # [K, N]: tokens t+2 .. t+1+K
    return first, (choices == truth[:, :count]).long().cumprod(0).sum(0)


def simulate(draft: Eagle3Draft, head: TargetHead, trajectory: Trajectory, length: int) -> Score:
    """Greedy speculation with K drafts, replayed on one trajectory."""
    _, prefix = accepted_prefix(draft, head, trajectory, length)
    accepted = [0] * length
    steps = position = 0
    prefixes = prefix.tolist()
    while position < len(prefixes):
        steps += 1
        for i in range(prefixes[position]):
            accepted[i] += 1
        position += prefixes[position] + 1
    return Score(steps, tuple(accepted))


@dataclass
class Recent:
    """Exponentially weighted score over recent trajectories, which the serving side gets for the live version.

    Args:
        length: K.
        memory: verifications after which evidence has lost 1 - 1/e of its weight.
    """

    length: int
    memory: float = 400.0
    steps: float = 0.0
    accepted: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accepted = self.accepted or [0.0] * self.length

    def add(self, score: Score) -> None:
        """Add a trajectory's score; earlier ones lose weight according to its number of verifications."""
        keep = max(0.0, 1.0 - score.steps / self.memory)
        self.steps = self.steps * keep + score.steps
        self.accepted = [old * keep + new for old, new in zip(self.accepted, score.accepted, strict=True)]

    def per_position(self) -> list[float]:
        """Share of verifications in which drafts 0..i were all accepted; zeros without evidence."""
        return [count / self.steps if self.steps else 0.0 for count in self.accepted]
