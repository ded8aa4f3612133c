"""A circuit breaker: learning may fail, serving may not."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("vllm.aurora")


class CircuitBreaker:
    """Runs work that must not raise; after ``limit`` failures in a row it runs nothing any more.

    Args:
        name: what is protected, for the log line.
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
        """Run the work unless the breaker is open. Returns whether it ran to its end."""
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
            elif not self._told:  # once: failures that alternate with successes never open it
                self._told = True
                logger.exception("aurora: %s failed; it is tried again", self._name)
            return False
        self._failures = 0
        return True
