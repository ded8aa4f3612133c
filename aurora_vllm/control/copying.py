"""Copy or draft? Decides whether tokens copied from earlier text are proposed instead of the draft's.

Both proposals exist in every step, and the token that the target emits next shows which first token was right,
whichever was verified. So the choice needs no exploration: it is a paired comparison, for each kind of copy (its
source, how many tokens matched, and whether the request is sampled). Numbers in, decisions out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from aurora_vllm.control.acceptance import Acceptance, Verdicts, faded_sum

MEMORY = 200.0  # comparisons remembered for each kind of copy
ROWS = 1000.0  # default of ``memory`` in Copies
WEIGHT_IN_DOUBT = 0.5
FEW = 10.0  # weight of what is assumed of a kind, in verifications


class Copies:
    """Statistics of copies by kind; kind 0 stands for no copy.

    Args:
        positions: largest draft length.
        usual: for each kind, 0 included, the chance to assume of each token, given those before it.
        memory: proposals after which counts of how often each kind occurs are halved.
    """

    def __init__(self, positions: int, usual: Sequence[float], memory: float = ROWS) -> None:
        self._positions, self._usual, self._memory = positions, usual, memory
        self._lead = [0.0] * len(usual)
        self._rows = [0.0] * len(usual)
        self._simulated = [Acceptance(positions) for _ in usual]
        self._chains: dict[int, list[float]] = {}  # those asked for since the kind's last outcome

    def seen(self, kind: int) -> None:
        """For a proposal there was a copy of this kind, whether or not it was taken."""
        self._rows[kind] += 1.0
        self._forget_rows()

    def _forget_rows(self) -> None:
        while sum(self._rows) > 2 * self._memory:
            self._rows = [count / 2.0 for count in self._rows]

    def compare(self, kind: int, copy_was_right: bool, draft_was_right: bool) -> None:
        """The target emitted the token for which copy and draft both had a proposal."""
        gain = int(copy_was_right) - int(draft_was_right)
        self._lead[kind] = self._lead[kind] * (1.0 - 1.0 / MEMORY) + gain

    def preferred(self, kind: int) -> bool:
        """Whether copies of this kind were right at least as often as drafts; without evidence they are tried."""
        return kind > 0 and self._lead[kind] >= 0.0

    def simulate(self, kind: int, num_drafts: int, num_accepted: int) -> None:
        """The outcome of verifying a copy, real or simulated."""
        self._simulated[kind].observe(num_drafts, num_accepted)
        self._chains.pop(kind, None)

    def take(
        self, seen: Sequence[int], compared: Mapping[int, tuple[int, int]], simulated: Mapping[int, Verdicts]
    ) -> None:
        """All of the above at once, for many proposals in unknown order.

        Args:
            seen: number of proposals, by kind.
            compared: by kind, how much more often the copy was right than the draft, and the number of comparisons.
            simulated: by kind, outcomes of verification.
        """
        self._rows = [before + count for before, count in zip(self._rows, seen, strict=True)]
        self._forget_rows()
        for kind, (gain, count) in compared.items():
            self._lead[kind] = faded_sum(self._lead[kind], gain / count, count, MEMORY)
        for kind, verdicts in simulated.items():
            self._simulated[kind].take(verdicts)
            self._chains.pop(kind, None)

    def doubt(self) -> None:
        """Proposals gain less than these statistics say, so they are out of date: weigh them less, and assume less."""
        self._rows[0] += sum(self._rows)
        self._usual = [chance * WEIGHT_IN_DOUBT for chance in self._usual]
        for one in self._simulated:
            one.fade(WEIGHT_IN_DOUBT)
        self._chains.clear()

    def chain(self, kind: int) -> list[float]:
        """Chance that copied tokens 0..i are all accepted, for each i."""
        if (known := self._chains.get(kind)) is not None:
            return known
        found = self._chains[kind] = self._simulated[kind].chain([self._usual[kind]] * self._positions, FEW)
        return found

    def expected(self, kind: int) -> float:
        """Mean number of copied tokens that would be accepted."""
        return sum(self.chain(kind))

    def expected_tokens(self) -> float:
        """Mean number of copied tokens that would be accepted of a proposal, whether or not there is a copy for it."""
        return sum(share * self.expected(kind) for kind, share in self.shares() if kind)

    def shares(self) -> Iterator[tuple[int, float]]:
        """Each kind and its share of proposals; only kind 0 before any was seen."""
        total = sum(self._rows)
        if not total:
            yield 0, 1.0
        for kind, count in enumerate(self._rows):
            if count:
                yield kind, count / total
