"""A circuit breaker, so that faults in learning do not stop serving."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.aurora")


class CircuitBreaker:
    """Runs work and catches what it raises; after ``limit`` failures in a row it runs nothing any more.

    Args:
        name: of the work, for the log line.
        limit: consecutive failures after which the breaker opens.
        on_failure: called with the error's text for each failure.
    """

    def __init__(self, name: str, limit: int = 3, on_failure: Callable[[str], None] | None = None) -> None:
        self._name = name
        self._limit = limit
        self._failures = 0
        self._told = False
        self._on_failure = on_failure

    @property
    def open(self) -> bool:
        """True once the work has been switched off for good."""
        return self._failures >= self._limit

    def run(self, work: Callable[[], object]) -> bool:
        """Run the work unless the breaker is open. Returns whether it succeeded."""
        if self.open:
            return False
        try:
            work()
        except Exception as error:
            self._failures += 1
            if self._on_failure is not None:
                self._on_failure(f"{type(error).__name__}: {error}")
            if self._failures >= self._limit:
                often = f" {self._limit} times in a row" if self._limit > 1 else ""
                logger.exception("aurora: %s failed%s and is off until restart", self._name, often)
            elif not self._told:  # only once, because failures that alternate with successes never open it
                self._told = True
                logger.exception("aurora: %s failed; it is tried again", self._name)
            return False
        self._failures = 0
        return True
