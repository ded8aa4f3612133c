"""Computes the demo's figures from blocks and samples. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from demo.client import Block
from demo.watch import Sample

LIVE_DRAFTS = 100  # verifications needed for a live acceptance length


@dataclass(frozen=True)
class Pair:
    """The same prompts, sent to both servers one after the other."""

    plain: Block
    aurora: Block

    @property
    def ratio(self) -> float:
        """Tokens per second with Aurora over tokens per second without."""
        return self.aurora.rate / self.plain.rate

    @property
    def changed(self) -> int:
        """Prompts whose greedy answers differ between the two."""
        plain = {answer.prompt: answer.text for answer in self.plain.answers}
        return sum(plain[answer.prompt] != answer.text for answer in self.aurora.answers)


@dataclass(frozen=True)
class Acceptance:
    """An acceptance length (bonus token included) and its source."""

    length: float
    source: str  # "live": vLLM's verdicts at the full K; "shadow": the learner's simulation on the same traffic


def acceptance(samples: Sequence[Sample], first: float, last: float, max_draft_length: int) -> Acceptance | None:
    """Acceptance length in a part of the run: the requests from ``first`` to ``last``, as shares of all.

    It is live if the server drafted the full K in nearly all verifications of that part and copied nothing: accepted
    tokens include copies, which may be longer than K. Else it is the mean of the learner's simulation, which is always
    at the full K. None if there is neither.
    """
    if not samples:
        return None
    begin, total = samples[0].requests, samples[-1].requests - samples[0].requests
    part = [s for s in samples if first * total <= s.requests - begin <= last * total]
    if not part:
        return None
    drafts = part[-1].drafts - part[0].drafts
    draft_tokens = part[-1].draft_tokens - part[0].draft_tokens
    copied = part[-1].copied_accepted > part[0].copied_accepted
    if not copied and drafts >= LIVE_DRAFTS and draft_tokens >= 0.98 * max_draft_length * drafts:
        return Acceptance(1.0 + (part[-1].accepted - part[0].accepted) / drafts, "live")
    shadow = [s.shadow_length for s in part if s.shadow_length is not None]
    return Acceptance(statistics.fmean(shadow), "shadow") if shadow else None


def rate_figures(name: str, pairs: Sequence[Pair]) -> tuple[dict[str, float], dict[str, Any]]:
    """Medians of the ratio, under ``name``, and of both rates; the spread holds every block's value."""
    if not pairs:
        return {}, {}
    series = {
        name: [pair.ratio for pair in pairs],
        f"{name}_plain_tokens_per_s": [pair.plain.rate for pair in pairs],
        f"{name}_aurora_tokens_per_s": [pair.aurora.rate for pair in pairs],
    }
    figures = {key: statistics.median(values) for key, values in series.items()}
    spread = {key: {"min": min(values), "max": max(values), "blocks": values} for key, values in series.items()}
    return figures, spread


def overall_ratio(pairs: Sequence[Pair]) -> float:
    """Aurora's overall rate (all tokens over all seconds) over plain vLLM's."""
    plain = sum(p.plain.tokens for p in pairs) / sum(p.plain.seconds for p in pairs)
    return sum(p.aurora.tokens for p in pairs) / sum(p.aurora.seconds for p in pairs) / plain
