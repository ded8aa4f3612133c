"""Speculation as in a server, simulated on recorded answers: the draft's tokens, or copies where those are better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aurora_vllm.config import AuroraConfig
from aurora_vllm.control.copying import Copies
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Score, accepted_prefix
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.spec_decode.prompt_lookup import KINDS, EarlierAnswers, PromptLookup


def simulate_with_copies(
    draft: Eagle3Draft, head: TargetHead, before: Iterable[Trajectory], trajectories: Iterable[Trajectory], length: int
) -> tuple[Score, Score]:
    """Simulate greedy speculation on answers, one after the other; ``spec_decode/copying.py`` does it in a server.

    Args:
        before: earlier answers, which may be copied from.
        trajectories: the answers to simulate; each may be copied from afterwards.
        length: K, tokens of a proposal.

    Returns:
        Two scores: with draft or copy, whichever is better for that kind of copy; and with copies alone.
    """
    answers = EarlierAnswers(AuroraConfig().prompt_lookup_answers)
    for one in before:
        answers.add(one.response_ids.tolist())
    chosen, alone = Walk(length, answers, always=False), Walk(length, answers, always=True)
    for one in trajectories:
        first, prefix = accepted_prefix(draft, head, one, length)
        drafted, tokens = prefix.tolist(), one.token_ids.tolist()
        chosen.answer(tokens, first + 2, drafted)
        alone.answer(tokens, first + 2, drafted)
        answers.add(one.response_ids.tolist())
    return chosen.score, alone.score


class Walk:
    """One way to propose, applied to answers.

    Args:
        length: K, tokens of a proposal.
        answers: other requests' answers, which may be copied from.
        always: propose a copy wherever there is one, and never the draft's tokens.
    """

    def __init__(self, length: int, answers: EarlierAnswers, always: bool) -> None:
        self.score = Score(0, (0,) * length)
        self._copies, self._answers, self._always, self._length = Copies(length, KINDS.usual), answers, always, length

    def answer(self, tokens: Sequence[int], first: int, drafted: Sequence[int]) -> None:
        """Walk through one answer.

        Args:
            tokens: the prompt's and the answer's.
            first: index of the first token that is proposed.
            drafted: drafted[i] is how many of the draft's tokens are right in a verification that begins i tokens on.
        """
        copies, length = self._copies, self._length
        lookup, steps, position, accepted = PromptLookup(), 0, 0, [0] * length
        while position < len(drafted):
            lookup.extend(tokens[len(lookup) : first + position])
            gained = 0 if self._always else drafted[position]
            both = lookup.propose(length), self._answers.propose(lookup.end(), length)
            found = [(copy, count_right(copy.tokens, tokens[first + position :])) for copy in both if copy is not None]
            if found:
                best, right = max(found, key=lambda pair: copies.expected(pair[0].kind()))
                if self._always or copies.preferred(best.kind()):
                    gained = right
                copies.compare(best.kind(), right > 0, drafted[position] > 0)
            for copy, right in found:
                copies.simulate(copy.kind(), len(copy.tokens), right)
            steps += 1
            for i in range(gained):
                accepted[i] += 1
            position += gained + 1
        self.score += Score(steps, tuple(accepted))


def count_right(proposed: Sequence[int], truth: Sequence[int]) -> int:
    """Length of the prefix of ``proposed`` that agrees with ``truth``."""
    pairs = zip(proposed, truth, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(proposed), len(truth)))
