"""What a server proposes, replayed on recorded answers: the draft's tokens, or copies where those are better."""

from __future__ import annotations

from collections.abc import Iterable

from aurora_vllm.control.copying import Copies
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.evaluate import Score, accepted_prefix
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.spec_decode.prompt_lookup import LONGEST_MATCH, PromptLookup


def simulate_with_copies(
    draft: Eagle3Draft, head: TargetHead, trajectories: Iterable[Trajectory], length: int
) -> tuple[Score, Score]:
    """Greedy speculation with K proposals over answers, one after the other, as ``spec_decode/copying.py`` makes them.

    Args:
        length: K.

    Returns:
        The score of the better of both by match length, and that of copies alone.
    """
    copies = Copies(length, LONGEST_MATCH)
    chosen = alone = Score(0, (0,) * length)
    for one in trajectories:
        first, prefix = accepted_prefix(draft, head, one, length)
        drafted, tokens = prefix.tolist(), one.token_ids.tolist()
        chosen += _walk(copies, tokens, first + 2, drafted, length, always=False)
        alone += _walk(Copies(length, LONGEST_MATCH), tokens, first + 2, drafted, length, always=True)
    return chosen, alone


def _walk(copies: Copies, tokens: list[int], first: int, drafted: list[int], length: int, always: bool) -> Score:
    """One answer. first: of the tokens proposed by the first verification; drafted[i]: how many of the draft's would be
    accepted i tokens later."""
    lookup, steps, position, accepted = PromptLookup(), 0, 0, [0] * length
    while position < len(drafted):
        lookup.extend(tokens[len(lookup) : first + position])
        gained = 0 if always else drafted[position]
        if (copy := lookup.propose(length)) is not None:
            truth = tokens[first + position : first + position + length]
            right = next((i for i, (a, b) in enumerate(zip(copy.tokens, truth, strict=True)) if a != b), length)
            if always or copies.preferred(copy.match_length):
                gained = right
            copies.compare(copy.match_length, right > 0, drafted[position] > 0)
        steps += 1
        for i in range(gained):
            accepted[i] += 1
        position += gained + 1
    return Score(steps, tuple(accepted))
