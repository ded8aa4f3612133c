"""The scheduler's side where the worker makes copies (:mod:`.device_copies`): reads the worker's counts.

There the scheduler sees how many tokens of a proposal were accepted, but not whether they were copied. So verdicts are
taken from the counts, which distinguish copies and come a few steps late.
"""

from __future__ import annotations

from aurora_vllm.control.copy_counts import KINDS, NUM_KINDS, CountsReader, TakeVerdicts
from aurora_vllm.control.copying import Copies
from aurora_vllm.transport.control import ControlBlock

ROWS = 250.0  # ``memory`` of Copies; shorter than its default, because here proposals without a copy cost time, too


class CopyEvidence:
    """Reads the counts, and tells the worker which kinds of copies to prefer to the draft's tokens.

    Args:
        control: its ``worker`` part is read, its ``scheduler`` part written.
        positions: longest proposal.
        take_verdicts: receives the verdicts.
    """

    def __init__(self, control: ControlBlock, positions: int, take_verdicts: TakeVerdicts) -> None:
        self._control, self._take_verdicts = control, take_verdicts
        self._reader = CountsReader(positions)
        self._copies = Copies(positions, KINDS.usual, ROWS)
        self._taken = 0
        self._on = False
        self._say_preferred()

    @property
    def copies(self) -> Copies | None:
        """Statistics of copies; None where the worker makes none."""
        return self._copies if self._control.worker.copies_on_device else None

    def look(self) -> None:
        """Take in the worker's counts, which are new every few steps. Call once a step."""
        worker = self._control.worker
        if (on := worker.copies_on_device) != self._on:
            self._on = on
            self._control.scheduler.copying = "on" if on else "failed in the worker: its log says how"
        if (taken := worker.copy_counts_taken) != self._taken:
            self._taken = taken
            self._reader.read(worker.copy_counts, self._copies, self._take_verdicts)
            self._say_preferred()

    def _say_preferred(self) -> None:
        preferred = (1 << kind for kind in range(NUM_KINDS) if self._copies.preferred(kind))
        self._control.scheduler.preferred_copies = sum(preferred)
