"""Copy or draft? Whether tokens copied from earlier in the request are proposed instead of the draft's.

Both proposals are there in every step, and what the target emits next shows which first token was right, whichever was
verified. So the choice needs no exploration: it is a comparison of pairs, by how many tokens matched. Numbers in,
decisions out.
"""

from __future__ import annotations

from collections.abc import Iterator

from aurora_vllm.control.acceptance import Acceptance

MEMORY = 200.0  # comparisons remembered for each match length
ROWS = 1000.0  # proposals remembered for how often text repeats itself
FEW = 10.0  # simulated verifications that count as misses beforehand, and weigh of what other match lengths say


class Copies:
    """What is known of copies, by match length; 0 stands for no match.

    Args:
        positions: largest draft length.
        longest: largest match length.
    """

    def __init__(self, positions: int, longest: int) -> None:
        self._lead = [0.0] * (longest + 1)
        self._rows = [0.0] * (longest + 1)
        self._simulated = [Acceptance(positions) for _ in range(longest + 1)]
        self._all = Acceptance(positions)

    def seen(self, match_length: int) -> None:
        """A proposal was made after a match this long."""
        self._rows = [count * (1.0 - 1.0 / ROWS) for count in self._rows]
        self._rows[match_length] += 1.0

    def compare(self, match_length: int, copy_was_right: bool, draft_was_right: bool) -> None:
        """The target emitted the token both had proposed for."""
        gain = int(copy_was_right) - int(draft_was_right)
        self._lead[match_length] = self._lead[match_length] * (1.0 - 1.0 / MEMORY) + gain

    def preferred(self, match_length: int) -> bool:
        """Whether copies after so long a match were right at least as often as drafts; unheard of, they are tried."""
        return match_length > 0 and self._lead[match_length] >= 0.0

    def simulate(self, match_length: int, num_drafts: int, num_accepted: int) -> None:
        """What verifying a copy would have shown, or has."""
        self._simulated[match_length].observe(num_drafts, num_accepted)
        self._all.observe(num_drafts, num_accepted)

    def chain(self, match_length: int) -> list[float]:
        """Chance that copied tokens 0..i are all accepted, for each i."""
        usual = [hits / (trials + FEW) for hits, trials in zip(self._all.hits, self._all.trials, strict=True)]
        return self._simulated[match_length].chain(usual, FEW)

    def shares(self) -> Iterator[tuple[int, float]]:
        """Match lengths, and how often each is met; no match where nothing is known."""
        total = sum(self._rows)
        if not total:
            yield 0, 1.0
        for match_length, count in enumerate(self._rows):
            if count:
                yield match_length, count / total
