"""The demo's plot: acceptance length and tokens/s over requests, swaps marked, and both servers side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from demo.watch import Point, Sample

PLAIN, AURORA, MARK = "#7f7f7f", "#1f77b4", "#d62728"


def plot(
    path: Path, samples: Sequence[Sample], points: Sequence[Point], figures: Mapping[str, float], day0_requests: int
) -> None:
    """Write the plot. ``samples`` and ``points`` are those of the learning phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 1), layout="constrained")
    rates = left.twinx()
    rates.plot([p.requests for p in points], [p.tokens_per_s for p in points], color=AURORA, alpha=0.45, lw=1.2)
    plain = figures.get("day0_ratio_plain_tokens_per_s")
    if plain:
        rates.axhline(plain, color=PLAIN, ls="--", lw=1)
        rates.annotate("plain vLLM", (0, plain), textcoords="offset points", xytext=(2, 3), color=PLAIN, fontsize=8)
    rates.set_ylabel("tokens/s at concurrency 4", color=AURORA)
    rates.set_ylim(bottom=0)

    known = [(s.requests, s.shadow_length) for s in samples if s.shadow_length is not None]
    if known:
        left.plot(
            *zip(*known, strict=True), color="black", lw=1.8, label="acceptance length, K=3 (simulated on the traffic)"
        )
    swaps = [now for before, now in itertools.pairwise(samples) if now.swaps > before.swaps]
    for i, swap in enumerate(swaps):
        left.axvline(swap.requests, color=MARK, lw=0.8, alpha=0.6, label="swap of draft weights" if i == 0 else None)
    left.axvspan(0, day0_requests, color=PLAIN, alpha=0.12, lw=0, label=f"first {day0_requests} requests")
    left.set(xlabel="requests served", ylabel="acceptance length", title="learning from the traffic, concurrency 4")
    left.set_ylim(1, max([2.0, *(length + 0.1 for _, length in known)]))
    left.set_xlim(left=0)
    left.set_zorder(rates.get_zorder() + 1)
    left.patch.set_visible(False)
    left.legend(loc="lower right", fontsize=8)

    for at, name in enumerate(("c1", "c4")):
        for shift, arm, colour in ((-0.2, "plain", PLAIN), (0.2, "aurora", AURORA)):
            value = figures.get(f"speedup_{name}_{arm}_tokens_per_s", 0.0)
            right.bar(
                at + shift,
                value,
                width=0.38,
                color=colour,
                label={"plain": "plain vLLM", "aurora": "Aurora"}[arm] if at == 0 else None,
            )
        if ratio := figures.get(f"speedup_{name}"):
            top = max(figures[f"speedup_{name}_{arm}_tokens_per_s"] for arm in ("plain", "aurora"))
            right.annotate(f"{ratio:.2f}×", (at, top), ha="center", textcoords="offset points", xytext=(0, 4))
    right.set_xticks([0, 1], ["concurrency 1", "concurrency 4"])
    right.set(ylabel="tokens/s", title="prompts not served before")
    right.margins(y=0.15)
    right.legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
