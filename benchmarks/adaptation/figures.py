"""Computes figures from windows. Pure functions; a figure whose windows were not run is absent.

A ratio of two arms covers the slots that both ran, where they got the same prompts one after the other. It is the
quotient of their overall rates: all tokens over all seconds. The spread of a figure holds the ratio of each slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.adaptation.plan import MEASURE

Pair = tuple["Window", "Window"]
COPIES = "copies"  # in place of a version


@dataclass(frozen=True)
class Window:
    """One arm's turn at a slot."""

    slot: int  # the slot's index in the plan, the same for all its arms
    workload: str
    part: str
    domain: str
    concurrency: int
    temperature: float
    arm: str
    first_request: int  # requests sent to the learning arm before this slot
    requests: int
    failed: int
    tokens: int  # generated
    seconds: float
    ttft_ms: dict[str, float]  # mean, p50, p99
    tpot_ms: dict[str, float]  # over requests: time after the first token, divided by the tokens after it
    itl_ms: dict[str, float]  # over gaps between two chunks of an answer
    acceptance_length: float | None = None  # bonus token included; None where nothing was drafted
    versions: list[dict[str, Any]] = field(default_factory=list)  # {"version", "drafts", "acceptance_length"}
    copied: dict[str, Any] = field(default_factory=dict)  # {"drafts", "acceptance_length"}; versions have no copies
    draft_lengths: list[list[float]] = field(default_factory=list)  # [seconds, K] at each change of K
    drafting_share: float | None = None  # share of the engine's steps that verified a proposal
    swaps: list[float] = field(default_factory=list)  # seconds
    learner: dict[str, Any] = field(default_factory=dict)  # {"cpu_share", "steps", "state", ...}

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


def figures(windows: Sequence[Window]) -> tuple[dict[str, float], dict[str, Any]]:
    """All figures of these windows, and the ratios of the slots behind each."""
    values: dict[str, float] = {}
    spread: dict[str, Any] = {}

    def add(name: str, some: Sequence[Pair]) -> None:
        if some:
            values[name] = pooled(some)
            spread[name] = [ratio(pair) for pair in some]

    everything = pairs(windows, "aurora", "plain")
    if everything:
        spread["worst_window_ratio"] = [ratio(pair) for pair in everything]
        values["worst_window_ratio"] = min(spread["worst_window_ratio"])
    add("over_plain", everything)
    for concurrency in (1, 4):
        measured = pairs(windows, "aurora", "plain", lambda w, c=concurrency: _measured(w, "day0", c))  # type: ignore[misc]
        add(f"day0_speedup_c{concurrency}", measured)
    add("day0_learned", pairs(windows, "aurora", "copies", lambda w: _measured(w, "day0")))
    shifted = pairs(windows, "aurora", "static", lambda w: _measured(w, "shift"))
    add("shift_speedup", shifted)
    add("shift_learning", pairs(windows, "aurora", "frozen", lambda w: _measured(w, "shift")))
    for domain in dict.fromkeys(window.domain for window, _ in shifted):
        add(f"shift_speedup_{domain.replace(' ', '_')}", [pair for pair in shifted if pair[0].domain == domain])
    add("k0_ratio", pairs(windows, "k0", "plain"))
    for other in ("suffix", "ngram"):
        add(f"over_{other}", pairs(windows, "aurora", other))
    return values, spread


def pairs(
    windows: Iterable[Window], arm: str, base: str, where: Callable[[Window], bool] = lambda window: True
) -> list[Pair]:
    """The two arms' windows of every slot in which both answered equally many requests, in order."""
    by_slot: dict[int, dict[str, Window]] = {}
    for window in windows:
        if where(window):
            by_slot.setdefault(window.slot, {})[window.arm] = window
    both = [(found[arm], found[base]) for _, found in sorted(by_slot.items()) if arm in found and base in found]
    return [(one, other) for one, other in both if one.failed == other.failed]


def ratio(pair: Pair) -> float:
    """Tokens per second of the first over the second."""
    return pair[0].rate / pair[1].rate


def pooled(some: Sequence[Pair]) -> float:
    """The ratio of the overall rates: all tokens over all seconds."""
    ours, theirs = ([pair[i] for pair in some] for i in (0, 1))
    rates = [sum(w.tokens for w in windows) / sum(w.seconds for w in windows) for windows in (ours, theirs)]
    return rates[0] / rates[1]


def table(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """A row per kind of window and arm: rate, latencies, and, where plain vLLM ran too, the rate relative to it.

    A latency is the mean of the windows' percentiles.
    """
    kinds: dict[tuple[Any, ...], list[Window]] = {}
    for window in windows:
        key = (window.workload, window.domain, window.part, window.concurrency, window.temperature)
        kinds.setdefault(key, []).append(window)
    rows = []
    for (workload, domain, part, concurrency, temperature), some in kinds.items():
        for arm in dict.fromkeys(window.arm for window in some):
            own = [window for window in some if window.arm == arm]
            against = pairs(some, arm, "plain")
            lengths = [window.acceptance_length for window in own if window.acceptance_length is not None]
            rows.append(
                {
                    "workload": workload, "domain": domain, "part": part, "concurrency": concurrency,
                    "temperature": temperature, "arm": arm, "windows": len(own),
                    "tokens_per_s": sum(w.tokens for w in own) / sum(w.seconds for w in own),
                    "over_plain": pooled(against) if against else None,
                    "acceptance_length": _mean(lengths) if lengths else None,
                    "ttft_p50_ms": _mean([w.ttft_ms["p50"] for w in own]),
                    "ttft_p99_ms": _mean([w.ttft_ms["p99"] for w in own]),
                    "tpot_p50_ms": _mean([w.tpot_ms["p50"] for w in own]),
                    "tpot_p99_ms": _mean([w.tpot_ms["p99"] for w in own]),
                }
            )  # fmt: skip
    return rows


def by_version(windows: Sequence[Window], arm: str) -> list[dict[str, Any]]:
    """Acceptance of each draft version of an arm, and of copies, over the whole run. A row has version, drafts and
    acceptance_length."""
    drafts: dict[int | str, int] = {}
    tokens: dict[int | str, float] = {}
    for window in windows:
        if window.arm != arm:
            continue
        for row in (*window.versions, *([window.copied | {"version": COPIES}] if window.copied else [])):
            drafts[row["version"]] = drafts.get(row["version"], 0) + row["drafts"]
            tokens[row["version"]] = tokens.get(row["version"], 0.0) + row["drafts"] * row["acceptance_length"]
    return [
        {"version": version, "drafts": drafts[version], "acceptance_length": tokens[version] / drafts[version]}
        for version in sorted(drafts, key=lambda version: (version == COPIES, version))
    ]


def _measured(window: Window, workload: str, concurrency: int | None = None) -> bool:
    right = window.workload == workload and window.part == MEASURE
    return right and (concurrency is None or window.concurrency == concurrency)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
