"""Two plots: tokens/s over the requests with swaps and shifts marked, and the speed relative to plain vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adaptation.figures import Window, table
from benchmarks.adaptation.plan import MEASURE

COLOURS = {
    "plain": "#7f7f7f", "ngram": "#2ca02c", "suffix": "#9467bd", "static": "#ff7f0e", "aurora": "#1f77b4",
    "frozen": "#8c564b", "k0": "#c7c7c7", "copies": "#17becf",
}  # fmt: skip
SWAP = "#d62728"
Key = tuple[str, str, int, float]


def plot(windows: Sequence[Window], labels: Mapping[str, str], json: Path) -> None:
    """Write ``NAME.png`` and ``NAME_speedups.png`` beside the JSON.

    Args:
        labels: the arms' labels, by name.
    """
    import matplotlib

    matplotlib.use("Agg")
    json.parent.mkdir(parents=True, exist_ok=True)
    _over_requests(windows, labels, json.with_suffix(".png"))
    _speedups(windows, labels, json.with_name(f"{json.stem}_speedups.png"))


def _over_requests(windows: Sequence[Window], labels: Mapping[str, str], path: Path) -> None:
    """A horizontal line per window and arm, over the requests of its slot."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(13, 5), layout="constrained")
    positions = _positions(windows)
    for arm, colour in COLOURS.items():
        own = [window for window in windows if window.arm == arm]
        for i, window in enumerate(own):
            start = positions[window.slot]
            ends = (start, start + window.requests)
            width = 3.5 if arm == "aurora" else 2
            label = labels[arm] if i == 0 else None
            axes.plot(ends, (window.rate, window.rate), color=colour, lw=width, label=label, solid_capstyle="butt")
    swaps = [
        positions[window.slot] + window.requests * min(at / window.seconds, 1.0)
        for window in windows
        if window.arm == "aurora"
        for at in window.swaps
    ]
    for i, x in enumerate(swaps):
        axes.axvline(x, ymax=0.04, color=SWAP, lw=1.2, label="swap of draft weights" if i == 0 else None)
    top = max(window.rate for window in windows)
    for i, (key, start, end) in enumerate(_stretches(windows, positions)):
        if i:
            axes.axvline(start, color="black", lw=0.8, ls=":")
        workload, domain, concurrency, temperature = key
        words = [workload] if domain in (workload, "mixed") else [workload, domain]
        words += [f"c={concurrency}"] + ([f"T={temperature:g}"] if temperature else [])
        axes.text((start + end) / 2, top * 1.03, "\n".join(words), ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="requests", ylabel="tokens/s of a window", xlim=(0, None), ylim=(0, top * 1.25))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _speedups(windows: Sequence[Window], labels: Mapping[str, str], path: Path) -> None:
    """A bar per arm, relative to plain vLLM, in a group per kind of measured window."""
    from matplotlib import pyplot

    groups: dict[str, dict[str, float]] = {}
    for row in table(windows):
        if row["part"] == MEASURE and row["over_plain"] is not None and row["arm"] != "plain":
            groups.setdefault(_group(row), {})[row["arm"]] = row["over_plain"]
    figure, axes = pyplot.subplots(figsize=(max(5.0, 1.9 * len(groups) + 2), 4.2), layout="constrained")
    named: set[str] = set()
    for at, speedups in enumerate(groups.values()):
        width = 0.8 / len(speedups)
        for i, (arm, value) in enumerate(sorted(speedups.items(), key=lambda item: list(COLOURS).index(item[0]))):
            x = at + (i - (len(speedups) - 1) / 2) * width
            label = None if arm in named else labels[arm]
            named.add(arm)
            axes.bar(x, value, width=width * 0.92, color=COLOURS[arm], label=label)
            axes.annotate(
                f"{value:.2f}", (x, value), ha="center", fontsize=8, textcoords="offset points", xytext=(0, 2)
            )
    axes.axhline(1.0, color="black", lw=1)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set(ylabel="tokens/s over plain vLLM", title="speed over plain vLLM, the learner running")
    axes.margins(y=0.12)
    if named:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _positions(windows: Sequence[Window]) -> dict[int, int]:
    """Where each slot begins on the axis: the number of requests in all slots before it."""
    sizes = {window.slot: window.requests for window in windows}
    starts, at = {}, 0
    for slot in sorted(sizes):
        starts[slot] = at
        at += sizes[slot]
    return starts


def _stretches(windows: Sequence[Window], positions: Mapping[int, int]) -> list[tuple[Key, int, int]]:
    """Neighbouring slots of the same kind: the kind, and where they begin and end."""
    slots = {window.slot: window for window in windows}
    found: list[tuple[Key, int, int]] = []
    for slot in sorted(slots):
        window = slots[slot]
        key = (window.workload, window.domain, window.concurrency, window.temperature)
        end = positions[slot] + window.requests
        if found and found[-1][0] == key:
            found[-1] = (key, found[-1][1], end)
        else:
            found.append((key, positions[slot], end))
    return found


def _group(row: Mapping[str, Any]) -> str:
    domain = [] if row["domain"] in (row["workload"], "mixed") else [row["domain"]]
    warm = f", T={row['temperature']:g}" if row["temperature"] else ""
    return "\n".join([row["workload"], *domain, f"concurrency {row['concurrency']}{warm}"])
