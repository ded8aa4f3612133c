"""How many tokens to draft, decided by measured tokens per second.

Acceptance alone is the wrong signal: a draft that is often right can still cost more than it saves once the batch is
compute-bound. So every draft length K, 0 included, is rated by ``expected accepted length / measured step time`` at the
present batch size, and the best rate wins. Numbers in, decisions out: this file knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from aurora_vllm.control.acceptance import Acceptance

UNTRIED_COST_PER_DRAFT = 0.08  # optimistic guess, of a plain step, so that a promising K is tried and then measured
STEPS_TO_KNOW = 5  # measurements of a (batch, K) pair before its time counts as known
PROBE_STEPS = 8
PROBE_EVERY = 160  # steps between two looks at the alternative
PATIENCE = 4  # times as many where the alternative looks bad: the look that said so may have been unlucky
HOPEFUL = 0.9  # of plain decoding's rate; a K that promises less looks bad
WORTH_A_PROBE = 1.1  # expected acceptance length below which drafting is not even tried
KEEP_MARGIN = 0.02  # a change must promise this much
SHADOW_WEIGHT = 40.0  # simulated verifications weigh as much as this many live ones
WEIGHT_OF_OLDER_VERSION = 0.25


@dataclass(frozen=True)
class Decision:
    """A draft length and, in words, why."""

    draft_length: int
    reason: str


def batch_bucket(batch_size: int) -> int:
    """Batch sizes whose step times are pooled: 1, 2, 3, 4, then powers of two."""
    return batch_size if batch_size <= 4 else 1 << (batch_size - 1).bit_length()


@dataclass
class AcceptanceEstimate:
    """Chance that draft i is accepted given that those before it were, from live verdicts and the learner's shadow.

    Args:
        positions: largest draft length.
        prior: conditional chance to assume before any evidence; 0 for a draft nobody has tried.
    """

    positions: int
    prior: float = 0.0
    _live: Acceptance = field(init=False)
    _shadow: list[float] = field(init=False)
    _copies: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self._live = Acceptance(self.positions)
        self._shadow = [self.prior] * self.positions
        self._copies = [0.0] * self.positions

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """One verified request of one step."""
        self._live.observe(num_drafts, num_accepted)

    def new_version(self) -> None:
        """Other weights are live: what the older ones did says less."""
        self._live.fade(WEIGHT_OF_OLDER_VERSION)

    def shadow(self, accepted_per_position: Sequence[float]) -> None:
        """The learner's simulation of the live weights: share of steps in which drafts 0..i were all accepted."""
        self._shadow = _conditional(accepted_per_position[: self.positions])

    def copies(self, accepted_per_position: Sequence[float]) -> None:
        """The same for drafts that are copied from the request: control/copying.py."""
        self._copies = _conditional(accepted_per_position[: self.positions])

    def expected_length(self, draft_length: int) -> float:
        """Mean tokens gained per verification with K drafts, the bonus token included (vLLM's acceptance length)."""
        length, chain = 1.0, 1.0
        for i in range(draft_length):
            # Of the two the better is proposed, so together they are at least as good as it.
            hits = self._live.hits[i] + SHADOW_WEIGHT * max(self._shadow[i], self._copies[i])
            chain *= hits / (self._live.trials[i] + SHADOW_WEIGHT)
            length += chain
        return length


def _conditional(shares: Sequence[float]) -> list[float]:
    """Chance of each draft given those before it, from the share of steps in which drafts 0..i were all accepted."""
    chances, before = [], 1.0
    for share in shares:
        chances.append(min(share / before, 1.0) if before > 0 else 0.0)
        before = share
    return chances


@dataclass
class StepTimes:
    """Seconds of a decode step by (batch bucket, K): the lower quartile of the last ``window`` ones.

    What disturbs a step (a prompt being tokenised, the learner's burst) is no property of K and only ever makes it
    longer. A probe is short enough for one burst to cover half of it, which a median would take for the cost of K.
    """

    window: int = 15  # two probes renew it: what plain decoding cost while the machine was busy must not last
    _recent: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    _typical: dict[tuple[int, int], float] = field(default_factory=dict)

    def observe(self, batch_size: int, draft_length: int, seconds: float) -> None:
        key = (batch_bucket(batch_size), draft_length)
        recent = self._recent.setdefault(key, deque(maxlen=self.window))
        recent.append(seconds)
        self._typical[key] = sorted(recent)[(len(recent) - 1) // 4]

    def known(self, bucket: int, draft_length: int) -> bool:
        return len(self._recent.get((bucket, draft_length), ())) >= STEPS_TO_KNOW

    def predict(self, bucket: int, draft_length: int) -> float | None:
        """Measured time, or a line through plain decoding and the nearest measured K; None without a plain time."""
        plain = self._typical.get((bucket, 0))
        if plain is None or not self.known(bucket, 0):
            return None
        if draft_length == 0 or self.known(bucket, draft_length):
            return self._typical[(bucket, draft_length)]
        measured = [k for (b, k) in self._recent if b == bucket and k > 0 and self.known(b, k)]
        if measured:
            nearest = min(measured, key=lambda k: abs(k - draft_length))
            slope = (self._typical[(bucket, nearest)] - plain) / nearest
            return plain + max(slope, 0.0) * draft_length
        return plain * (1.0 + UNTRIED_COST_PER_DRAFT * draft_length)


@dataclass
class _BucketState:
    draft_length: int = 0
    steps: int = 0
    probe_left: int = 0
    probe_length: int = 0


@dataclass
class DraftLengthController:
    """Chooses K for the next step.

    Args:
        max_draft_length: K is in 0..max_draft_length.
        mode: "auto" weighs; "always" and "never" fix K.
        prior: conditional acceptance to assume before evidence (0: wait for the learner's shadow).
    """

    max_draft_length: int
    mode: str = "auto"
    prior: float = 0.0
    wants_verdicts: bool = False  # probe even a draft that seems hopeless: somebody has to know
    times: StepTimes = field(default_factory=StepTimes)
    acceptance: AcceptanceEstimate = field(init=False)
    _buckets: dict[int, _BucketState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.acceptance = AcceptanceEstimate(self.max_draft_length, self.prior)

    def decide(self, batch_size: int) -> Decision:
        """K for a step over this many requests. Call once for each step."""
        if self.mode == "never":
            return Decision(0, "speculation is switched off by the settings")
        if self.mode == "always":
            return Decision(self.max_draft_length, "draft length is fixed by the settings")
        bucket = batch_bucket(batch_size)
        state = self._buckets.setdefault(bucket, _BucketState())
        state.steps += 1
        if not self.times.known(bucket, 0):
            return Decision(0, f"measuring plain decoding at batch {bucket}")
        if state.probe_left > 0:
            state.probe_left -= 1
            return Decision(state.probe_length, f"probing K={state.probe_length} at batch {bucket}")

        gains = {k: self.gain(bucket, k) for k in range(self.max_draft_length + 1)}
        best = max(gains, key=lambda k: gains[k])
        if gains[best] > gains[state.draft_length] * (1.0 + KEEP_MARGIN) or gains[state.draft_length] < 1.0:
            state.draft_length = best
        chosen = state.draft_length
        self._maybe_probe(state, gains)
        verb = "pays" if chosen else "does not pay"
        shown = chosen or max(range(1, self.max_draft_length + 1), key=lambda k: gains[k])
        reason = (
            f"drafting {verb} at batch {bucket}: K={shown} gives {gains[shown]:.2f}x of plain decoding "
            f"(acceptance length {self.acceptance.expected_length(shown):.2f})"
        )
        return Decision(chosen, reason)

    def gain(self, bucket: int, draft_length: int) -> float:
        """Tokens per second with K drafts over tokens per second without, as measured or predicted."""
        plain, speculative = self.times.predict(bucket, 0), self.times.predict(bucket, draft_length)
        if plain is None or speculative is None:
            return 1.0 if draft_length == 0 else 0.0
        return self.acceptance.expected_length(draft_length) * plain / speculative

    def _maybe_probe(self, state: _BucketState, gains: dict[int, float]) -> None:
        """Plain decoding is looked at again while drafting; drafting again while off, seldom where it looks bad."""
        if state.draft_length > 0:
            if state.steps >= PROBE_EVERY:
                state.steps, state.probe_length, state.probe_left = 0, 0, PROBE_STEPS
            return
        candidate = max(range(1, self.max_draft_length + 1), key=lambda k: gains[k])
        wait = PROBE_EVERY * (1 if gains[candidate] >= HOPEFUL or self.wants_verdicts else PATIENCE)
        worth_it = self.acceptance.expected_length(candidate) >= WORTH_A_PROBE or self.wants_verdicts
        if state.steps >= wait and worth_it:
            state.steps, state.probe_length, state.probe_left = 0, candidate, PROBE_STEPS
