"""When to look at what was not chosen: plain decoding while anything is proposed, drafting while it is off.

Estimates of what is not in use get old. So now and then it is used for a few steps, whatever it promises. Numbers in,
decisions out.
"""

from __future__ import annotations

from dataclasses import dataclass

PROBE_STEPS = 8
PROBE_EVERY = 240  # steps between two looks at the alternative
PATIENCE = 4  # times as many where the alternative looks bad, in case the look that said so was unlucky


@dataclass
class Probing:
    """The probes at one batch size.

    Attributes:
        length: tokens drafted in the present or the last probe; 0 for plain decoding.
    """

    length: int = 0
    _left: int = 0  # steps
    _since_plain: int = 0
    _since_drafts: int = 0
    _since_forgot: int = 0

    def count_step(self) -> None:
        """Call for every step."""
        self._since_plain += 1
        self._since_drafts += 1
        self._since_forgot += 1

    def takes_next_step(self) -> bool:
        """Whether the next step is one of a probe; if so, counts it."""
        if not self._left:
            return False
        self._left -= 1
        return True

    def drafted(self) -> None:
        """Drafts are in use, so they need no probe for a while."""
        self._since_drafts = 0

    def decided(self, verifies: bool, drafts: bool, alternative: int, hopeful: bool) -> None:
        """After a decision: begin a probe with the next step, if one is due.

        Args:
            verifies: whether anything is proposed.
            drafts: whether the draft proposes.
            alternative: otherwise, the draft length to probe; 0 where drafting is not worth one.
            hopeful: it looks about as good as what was decided.
        """
        if verifies and self._since_plain >= PROBE_EVERY:
            self._since_plain, self.length, self._left = 0, 0, PROBE_STEPS
        elif drafts:
            self.drafted()
        elif alternative and self._since_drafts >= PROBE_EVERY * (1 if hopeful else PATIENCE):
            self._since_drafts, self.length, self._left = 0, alternative, PROBE_STEPS

    def is_out_of_date(self) -> bool:
        """Where drafting is not even probed: whether its verdicts, on traffic that may be long gone, are to be weighed
        less. They would stand for ever."""
        if self._left or self._since_forgot < PROBE_EVERY * PATIENCE:
            return False
        self._since_forgot = 0
        return True
