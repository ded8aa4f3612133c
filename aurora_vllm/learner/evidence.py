"""When a candidate replaces the incumbent: on evidence, or unjudged (``sync``)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from aurora_vllm.learner.evaluate import Score


@dataclass(frozen=True)
class PublishDecision:
    """What the evidence says."""

    publish: bool
    reason: str
    candidate: float  # acceptance length over the evidence
    incumbent: float
    tokens: int  # response tokens on which both were judged


@dataclass
class Evidence:
    """Paired prequential scores: candidate and incumbent on the same trajectories, before either trained on them.

    Args:
        min_tokens: response tokens needed for a decision. Evidence beyond this is dropped, oldest first, because the
            candidate has been trained since.
        margin: acceptance length by which the candidate must win; at 0 a tie is no win.
        min_interval_s: shortest time between two publishes.
        length: K.
    """

    min_tokens: int
    margin: float
    min_interval_s: float
    length: int
    _pairs: deque[tuple[Score, Score]] = field(default_factory=deque)
    _tokens: int = 0
    _last_publish_s: float = float("-inf")

    def add(self, candidate: Score, incumbent: Score) -> None:
        """Both scores of one trajectory. Without a verification (the answer was too short) they are ignored."""
        if not incumbent.steps:
            return
        self._pairs.append((candidate, incumbent))
        self._tokens += incumbent.tokens
        while self._pairs and self._tokens - self._pairs[0][1].tokens >= self.min_tokens:
            self._tokens -= self._pairs.popleft()[1].tokens

    def decide(self, now_s: float) -> PublishDecision:
        """Whether the candidate wins. now_s: seconds on any monotonic clock."""
        candidate, incumbent = self.candidate.acceptance_length, self.incumbent.acceptance_length

        def say(publish: bool, reason: str) -> PublishDecision:
            return PublishDecision(publish, reason, candidate, incumbent, self._tokens)

        if self._tokens < self.min_tokens:
            return say(False, f"{self._tokens} of {self.min_tokens} response tokens of evidence")
        if candidate <= incumbent or candidate < incumbent + self.margin:
            return say(False, f"candidate {candidate:.2f} does not beat incumbent {incumbent:.2f} by {self.margin:g}")
        if now_s - self._last_publish_s < self.min_interval_s:
            return say(False, f"published less than {self.min_interval_s:g} s ago")
        return say(True, f"candidate {candidate:.2f} beats incumbent {incumbent:.2f} on {self._tokens} response tokens")

    @property
    def candidate(self) -> Score:
        """The candidate's score over all of the evidence."""
        return sum((pair[0] for pair in self._pairs), Score(0, (0,) * self.length))

    @property
    def incumbent(self) -> Score:
        """The incumbent's score over all of the evidence."""
        return sum((pair[1] for pair in self._pairs), Score(0, (0,) * self.length))

    def published(self, now_s: float) -> None:
        """Start over after a publish."""
        self.restart()
        self._last_publish_s = now_s

    def restart(self) -> None:
        """Drop all scores, because they are of another candidate."""
        self._pairs.clear()
        self._tokens = 0


@dataclass
class Sync:
    """When a candidate is published: on evidence, or unjudged after a number of optimizer steps or requests (steps in
    Aurora's release, ``decode.weight_sync_interval``; requests in its paper).

    Args:
        policy: "evidence", "steps" or "requests".
        interval: in steps or requests, for the latter two.
    """

    policy: str
    interval: int
    _steps: int = 0  # at the last publish
    _requests: int = 0

    def reason(self, decision: PublishDecision, steps: int, requests: int) -> str:
        """Why to publish now; empty if not. steps, requests: since the learner began."""
        if self.policy == "evidence":
            return decision.reason if decision.publish else ""
        passed = steps - self._steps if self.policy == "steps" else requests - self._requests
        return f"{passed} {self.policy} since the last publish" if passed >= self.interval else ""

    def published(self, steps: int, requests: int) -> None:
        self._steps, self._requests = steps, requests
