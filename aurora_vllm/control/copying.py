"""Copy or draft? Whether tokens copied from earlier in the request are proposed instead of the draft's.

Both proposals are there in every step, and what the target emits next shows which first token was right, whichever was
verified. So the choice needs no exploration: it is a comparison of pairs, by how many tokens matched. Numbers in,
decisions out.
"""

from __future__ import annotations

from aurora_vllm.control.acceptance import Acceptance

MEMORY = 200.0  # comparisons remembered for each match length
FEW = 10.0  # simulated verifications that count as misses beforehand


class CopyChoice:
    """Compares copies with drafts of the same step.

    Args:
        positions: largest draft length.
        longest: largest match length.
    """

    def __init__(self, positions: int, longest: int) -> None:
        self._lead = [0.0] * (longest + 1)
        self._simulated = Acceptance(positions)

    def compare(self, match_length: int, copy_was_right: bool, draft_was_right: bool) -> None:
        """The target emitted the token both had proposed for."""
        gain = int(copy_was_right) - int(draft_was_right)
        self._lead[match_length] = self._lead[match_length] * (1.0 - 1.0 / MEMORY) + gain

    def prefers_copy(self, match_length: int) -> bool:
        """Whether copies after so long a match were right at least as often as drafts; unheard of, they are tried."""
        return self._lead[match_length] >= 0.0

    def simulate(self, num_drafts: int, num_accepted: int) -> None:
        """What a step that copies alone would have shown: accepted copies, 0 where nothing matched."""
        self._simulated.observe(num_drafts, num_accepted)

    def accepted_per_position(self) -> list[float]:
        """Share of steps in which copies 0..i would all have been accepted, had nothing but copies been proposed."""
        chain, shares = 1.0, []
        for trials, hits in zip(self._simulated.trials, self._simulated.hits, strict=True):
            chain *= hits / (trials + FEW)
            shares.append(chain)
        return shares
