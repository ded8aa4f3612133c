"""Where the worker replaces proposals (:mod:`.device_copies`): what the scheduler's side makes of its counts.

The scheduler sees how many tokens of a proposal were accepted there, but not whether they were copied. So verdicts are
taken from the counts, which know it, and come a few steps late.
"""

from __future__ import annotations

from aurora_vllm.control.copy_counts import NUM_KINDS, CountsReader, TakeVerdicts
from aurora_vllm.control.copying import Copies
from aurora_vllm.transport.control import ControlBlock

ROWS = 250.0  # proposals after which how often there was a copy counts half: here those without one cost, too


class CopyEvidence:
    """Reads the counts, and says which kinds of copies go before the draft's tokens.

    Args:
        control: read from its ``worker`` part; its ``scheduler`` part is written.
        positions: of the proposals.
        take_verdicts: what became of what was proposed.
    """

    def __init__(self, control: ControlBlock, positions: int, take_verdicts: TakeVerdicts) -> None:
        self._control, self._take_verdicts = control, take_verdicts
        self._reader = CountsReader(positions)
        self._copies = Copies(positions, NUM_KINDS, ROWS)
        self._taken = 0
        self._on = False
        self._say_preferred()

    @property
    def copies(self) -> Copies | None:
        """What is known of copies; None where the worker makes none."""
        return self._copies if self._control.worker.copies_on_device else None

    def look(self) -> None:
        """Take in what the worker has counted. Call once a step; there is something new every few steps."""
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
