"""When to try again what looked too expensive.

What verifying costs is learned from steps that verify. If the first of them are slow for another reason (another
process, cold caches), copies look too expensive, nothing is verified, and nothing corrects the impression until it has
faded, some 500 steps later. So it is doubted earlier, and less often each time that does not help.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = 8  # decisions without verifying after which there is a second chance; doubled each time
MOST = 16 * FIRST
LASTING = 32  # decisions in a row to verify, after which the next second chance comes early again


@dataclass
class SecondChance:
    """Counts decisions to verify, and not to."""

    wait: int = FIRST
    idle: int = 0
    busy: int = 0

    def is_due(self, verifies: bool) -> bool:
        """Whether to try again. Call for each decision, with what it is, while there is something to try."""
        if verifies:
            self.idle, self.busy = 0, self.busy + 1
            if self.busy >= LASTING:
                self.wait = FIRST
            return False
        self.idle, self.busy = self.idle + 1, 0
        if self.idle < self.wait:
            return False
        self.idle, self.wait = 0, min(2 * self.wait, MOST)
        return True
