"""The plot of ``benchmarks.learning``: acceptance length over tokens seen, and over the learner's CPU seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class RunLike(Protocol):
    @property
    def tokens(self) -> list[int]: ...
    @property
    def seconds(self) -> list[float]: ...
    def running(self) -> list[float]: ...


def plot(runs: Mapping[str, Sequence[RunLike]], goal: float, path: Path) -> None:
    """Write a PNG with one line per arm, the median over its seeds; the first arm is drawn thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_tokens, by_seconds) = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for i, (label, some) in enumerate(runs.items()):
        means = [statistics.median(values) for values in zip(*(run.running() for run in some), strict=True)]
        seconds = [statistics.median(values) for values in zip(*(run.seconds for run in some), strict=True)]
        style = {"label": label, "linewidth": 2.5 if i == 0 else 1.2, "zorder": 3 if i == 0 else 2}
        by_tokens.plot(some[0].tokens, means, **style)
        by_seconds.plot(seconds, means, **style)
    by_tokens.set_xlabel("tokens seen (rows of trajectories)")
    by_seconds.set_xlabel("CPU seconds of the learner")
    by_tokens.set_ylabel("acceptance length, K=3, before training on it")
    for axes in (by_tokens, by_seconds):
        axes.axhline(goal, color="grey", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
