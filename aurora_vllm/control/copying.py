"""Copy or draft? Whether tokens copied from earlier text are proposed instead of the draft's.

Both proposals are there in every step, and what the target emits next shows which first token was right, whichever was
verified. So the choice needs no exploration: it is a comparison of pairs, by the kind of copy: where it comes from,
how many tokens matched, and whether the request is sampled. Numbers in, decisions out.
"""

from __future__ import annotations

from collections.abc import Iterator

from aurora_vllm.control.acceptance import Acceptance, faded_sum

MEMORY = 200.0  # comparisons remembered for each kind of copy
ROWS = 1000.0  # proposals after which what is known of how often text repeats itself counts half
FEW = 10.0  # simulated verifications that count as misses beforehand, and weigh of what other kinds say


class Copies:
    """What is known of copies, by kind; kind 0 stands for no copy.

    Args:
        positions: largest draft length.
        kinds: how many there are, kind 0 included.
    """

    def __init__(self, positions: int, kinds: int) -> None:
        self._lead = [0.0] * kinds
        self._rows = [0.0] * kinds
        self._simulated = [Acceptance(positions) for _ in range(kinds)]
        self._all = Acceptance(positions)

    def seen(self, kind: int, count: int = 1) -> None:
        """So many proposals could have been such a copy."""
        self._rows[kind] += count
        while sum(self._rows) > 2 * ROWS:
            self._rows = [count / 2.0 for count in self._rows]

    def compare(self, kind: int, copy_was_right: bool, draft_was_right: bool, count: int = 1) -> None:
        """The target emitted the token both had proposed for; ``count`` times with the same outcome."""
        gain = float(copy_was_right) - float(draft_was_right)
        self._lead[kind] = faded_sum(self._lead[kind], gain, count, MEMORY)

    def preferred(self, kind: int) -> bool:
        """Whether copies of this kind were right at least as often as drafts; unheard of, they are tried."""
        return kind > 0 and self._lead[kind] >= 0.0

    def simulate(self, kind: int, num_drafts: int, num_accepted: int, count: int = 1) -> None:
        """What verifying a copy would have shown, or has; ``count`` times."""
        self._simulated[kind].observe(num_drafts, num_accepted, count)
        self._all.observe(num_drafts, num_accepted, count)

    def chain(self, kind: int) -> list[float]:
        """Chance that copied tokens 0..i are all accepted, for each i."""
        usual = [hits / (trials + FEW) for hits, trials in zip(self._all.hits, self._all.trials, strict=True)]
        return self._simulated[kind].chain(usual, FEW)

    def expected(self, kind: int) -> float:
        """Copied tokens accepted, on average, where all are verified."""
        return sum(self.chain(kind))

    def shares(self) -> Iterator[tuple[int, float]]:
        """Kinds, and how often each is met; no copy where nothing is known."""
        total = sum(self._rows)
        if not total:
            yield 0, 1.0
        for kind, count in enumerate(self._rows):
            if count:
                yield kind, count / total
