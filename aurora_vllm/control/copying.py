"""Copy or draft? Whether tokens copied from earlier text are proposed instead of the draft's.

Both proposals are there in every step, and what the target emits next shows which first token was right, whichever was
verified. So the choice needs no exploration: it is a comparison of pairs, by the kind of copy: where it comes from,
how many tokens matched, and whether the request is sampled. Numbers in, decisions out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from aurora_vllm.control.acceptance import Acceptance, Verdicts, faded_sum

MEMORY = 200.0  # comparisons remembered for each kind of copy
ROWS = 1000.0  # see Copies, memory
WEIGHT_IN_DOUBT = 0.5
FEW = 10.0  # simulated verifications that count as misses beforehand, and weigh of what other kinds say


class Copies:
    """What is known of copies, by kind; kind 0 stands for no copy.

    Args:
        positions: largest draft length.
        kinds: how many there are, kind 0 included.
        memory: proposals after which what is known of how often text repeats itself counts half.
    """

    def __init__(self, positions: int, kinds: int, memory: float = ROWS) -> None:
        self._memory = memory
        self._lead = [0.0] * kinds
        self._rows = [0.0] * kinds
        self._simulated = [Acceptance(positions) for _ in range(kinds)]
        self._all = Acceptance(positions)

    def seen(self, kind: int) -> None:
        """A proposal could have been such a copy."""
        self._rows[kind] += 1.0
        self._forget_rows()

    def _forget_rows(self) -> None:
        while sum(self._rows) > 2 * self._memory:
            self._rows = [count / 2.0 for count in self._rows]

    def compare(self, kind: int, copy_was_right: bool, draft_was_right: bool) -> None:
        """The target emitted the token both had proposed for."""
        gain = int(copy_was_right) - int(draft_was_right)
        self._lead[kind] = self._lead[kind] * (1.0 - 1.0 / MEMORY) + gain

    def preferred(self, kind: int) -> bool:
        """Whether copies of this kind were right at least as often as drafts; unheard of, they are tried."""
        return kind > 0 and self._lead[kind] >= 0.0

    def simulate(self, kind: int, num_drafts: int, num_accepted: int) -> None:
        """What verifying a copy would have shown, or has."""
        self._simulated[kind].observe(num_drafts, num_accepted)
        self._all.observe(num_drafts, num_accepted)

    def take(
        self, seen: Sequence[int], compared: Mapping[int, tuple[int, int]], simulated: Mapping[int, Verdicts]
    ) -> None:
        """All of that at once, much of it and in an order that is not known.

        Args:
            seen: how often, by kind.
            compared: by kind, how much more often the copy was right than the draft, of how many comparisons.
            simulated: by kind, what became of copies.
        """
        self._rows = [before + count for before, count in zip(self._rows, seen, strict=True)]
        self._forget_rows()
        for kind, (gain, count) in compared.items():
            self._lead[kind] = faded_sum(self._lead[kind], gain / count, count, MEMORY)
        together: Counter[tuple[int, int]] = Counter()
        for kind, verdicts in simulated.items():
            self._simulated[kind].take(verdicts)
            together.update(verdicts)
        self._all.take(together)

    def doubt(self) -> None:
        """What was proposed gains less than all of this says: it was so some time ago."""
        self._rows[0] += sum(self._rows)
        for one in (*self._simulated, self._all):
            one.fade(WEIGHT_IN_DOUBT)

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
