"""The demo's state while it runs: samples of ``/aurora/status``, and the answers as they arrive."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from demo.client import Answer
from demo.servers import Server

RATE_WINDOW = 12  # answers
EVERY_S = 1.0  # between two samples


@dataclass(frozen=True)
class Sample:
    """The parts of a status that figures and the plot need."""

    requests: int  # that the learning server has answered
    live_version: int
    draft_length: int
    swaps: int
    # The acceptance length that the learner simulates for the version it evaluates; None without evidence.
    shadow_length: float | None
    drafts: int  # verifications so far, of all versions and of copies
    draft_tokens: int
    accepted: int
    copied_drafts: int = 0  # verifications of copies
    copied_accepted: int = 0

    @classmethod
    def of(cls, status: dict[str, Any], requests: int) -> Sample:
        """From the answer of ``GET /aurora/status``."""
        versions, learner = status["versions"], status["learner"]
        own, copies = versions["total"], status["speculation"]
        shares = learner["shadow_accepted_per_position"]
        return cls(
            requests=requests,
            live_version=versions["live"],
            draft_length=status["speculation"]["draft_length"],
            swaps=status["swaps"]["swaps"],
            shadow_length=1.0 + sum(shares) if learner["shadow_steps"] else None,
            drafts=own["num_drafts"] + copies["copied_drafts"],
            draft_tokens=own["num_draft_tokens"] + copies["copied_tokens"],
            accepted=own["num_accepted"] + copies["copied_accepted"],
            copied_drafts=copies["copied_drafts"],
            copied_accepted=copies["copied_accepted"],
        )


@dataclass
class Point:
    """A point of the plot: the requests answered until then, and the rate of the latest answers."""

    requests: int
    tokens_per_s: float


@dataclass
class Progress:
    """Shared by the run, the watcher and the view. Each field has one writer, so there is no lock."""

    phase: str = "starting"
    detail: str = ""
    arm: str = ""  # which server gets requests now
    requests: dict[str, int] = field(default_factory=lambda: {"plain": 0, "aurora": 0})
    rates: dict[str, float] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    _recent: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)
    _busy: dict[str, float] = field(default_factory=dict)  # seconds in earlier blocks; pauses do not count
    _last: dict[str, float] = field(default_factory=dict)

    def block_begins(self, arm: str) -> None:
        """The arm's next block begins. Only the time in blocks counts for rates."""
        self.arm = arm
        self._busy[arm] = self._last.get(arm, 0.0)

    def answered(self, arm: str, answer: Answer) -> None:
        """Count an answer and update the arm's rate."""
        self.requests[arm] += 1
        now = self._busy.get(arm, 0.0) + answer.at
        self._last[arm] = now
        recent = self._recent.setdefault(arm, deque([(0.0, 0)], maxlen=RATE_WINDOW + 1))
        recent.append((now, answer.tokens))
        elapsed = now - recent[0][0]
        if elapsed > 0:
            self.rates[arm] = sum(tokens for _, tokens in list(recent)[1:]) / elapsed
        if arm == "aurora" and self.phase in ("day 0", "learning"):
            self.points.append(Point(self.requests[arm], self.rates.get(arm, 0.0)))

    def seen(self, status: dict[str, Any]) -> None:
        """Take a status of the learning server."""
        self.samples.append(Sample.of(status, self.requests["aurora"]))
        self.status = status


class Watcher(threading.Thread):
    """Queries a server's status once a second."""

    def __init__(self, server: Server, seen: Callable[[dict[str, Any]], None]) -> None:
        """
        Args:
            seen: called with each status, in this thread.
        """
        super().__init__(name="watcher", daemon=True)
        self._server, self._seen = server, seen
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            status = self._server.status()
            if "versions" in status:  # the server answered
                self._seen(status)

    def stop(self) -> None:
        self._stopping.set()
        self.join()
