"""The demo on screen: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.watch import Progress

LINE_EVERY_S = 20.0
VERSIONS_SHOWN = 6


@contextmanager
def shown(progress: Progress, console: Console, deadline: float) -> Iterator[None]:
    """Show the progress while the block runs. deadline: value of ``time.monotonic()`` at which the demo should end."""
    if console.is_terminal:
        with Live(
            get_renderable=lambda: panel(progress, deadline), console=console, refresh_per_second=4, transient=True
        ):
            yield
        return
    lines = _Lines(progress, console, deadline)
    lines.start()
    try:
        yield
    finally:
        lines.stop()


class _Lines(threading.Thread):
    """Prints a line at every change of phase or version, and every 20 s."""

    def __init__(self, progress: Progress, console: Console, deadline: float) -> None:
        super().__init__(name="lines", daemon=True)
        self._progress, self._console, self._deadline = progress, console, deadline
        self._stopping = threading.Event()

    def run(self) -> None:
        shown_key, shown_at = None, 0.0
        while not self._stopping.wait(0.5):
            key = (self._progress.phase, _live_version(self._progress.status))
            if key != shown_key or time.monotonic() - shown_at >= LINE_EVERY_S:
                self._console.print(line(self._progress, self._deadline), highlight=False, soft_wrap=True)
                shown_key, shown_at = key, time.monotonic()

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def line(progress: Progress, deadline: float) -> str:
    """The state in one line."""
    parts = [f"{_left(deadline)} {progress.phase}"]
    if progress.detail:
        parts.append(progress.detail)
    for arm, count in progress.requests.items():
        if count:
            parts.append(f"{arm} {count} requests, {progress.rates.get(arm, 0):.1f} tok/s")
    if status := progress.status:
        learner = status["learner"]
        parts.append(f"draft v{status['versions']['live']}, {status['swaps']['swaps']} swaps")
        parts.append(f"acceptance {_shadow(learner)}")
        parts.append(f"K={status['speculation']['draft_length']} ({status['speculation']['reason']})")
        parts.append(f"learner {_state(progress)}, step {learner['step']}")
    return " | ".join(parts)


def panel(progress: Progress, deadline: float) -> RenderableType:
    """The state as a panel."""
    title = f"aurora_vllm demo — {progress.phase} — {_left(deadline)}"
    parts: list[RenderableType] = [Text(progress.detail, style="dim")] if progress.detail else []
    arms = Table("server", "requests", "tokens/s", box=None, pad_edge=False)
    for arm, count in progress.requests.items():
        mark = "▶ " if arm == progress.arm else "  "
        rate = f"{progress.rates[arm]:.1f}" if arm in progress.rates else "–"
        arms.add_row(mark + {"plain": "plain vLLM", "aurora": "with Aurora"}[arm], str(count), rate)
    parts.append(arms)
    if status := progress.status:
        parts += [Text(), _facts(progress), Text(), _versions(status)]
    return Panel(Group(*parts), title=title, border_style="cyan")


def _facts(progress: Progress) -> Table:
    status, learner = progress.status, progress.status["learner"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("draft length", f"K={status['speculation']['draft_length']}: {status['speculation']['reason']}")
    facts.add_row("swaps", f"{status['swaps']['swaps']} (refused {status['swaps']['refusals']})")
    facts.add_row(
        "learner",
        f"{_state(progress)}, step {learner['step']}, {learner['tokens_trained']} tokens trained {learner['message']}",
    )
    facts.add_row("acceptance length", f"{_shadow(learner)} (the learner's simulation on the traffic, full K)")
    ring = status["ring"]
    dropped = status["capture"]["requests_dropped"]
    facts.add_row("trace ring", f"{ring['used_share']:.0%} of {ring['capacity']} rows, {dropped} requests dropped")
    return facts


def _versions(status: dict[str, Any]) -> Table:
    table = Table("draft version", "verifications", "acceptance length", box=None, pad_edge=False)
    for row in status["versions"]["acceptance"][-VERSIONS_SHOWN:]:
        live = " (live)" if row["version"] == status["versions"]["live"] else ""
        table.add_row(f"{row['version']}{live}", str(row["num_drafts"]), f"{row['mean_acceptance_length']:.2f}")
    return table


def _state(progress: Progress) -> str:
    # While the baseline is measured, the learner is stopped; its server cannot tell that.
    return "paused for the baseline" if progress.arm == "plain" else str(progress.status["learner"]["state"])


def _shadow(learner: dict[str, Any]) -> str:
    if not learner["shadow_steps"]:
        return "not known yet"
    return f"{1 + sum(learner['shadow_accepted_per_position']):.2f} of v{learner['shadow_version']}"


def _live_version(status: dict[str, Any]) -> int:
    return int(status["versions"]["live"]) if status else 0


def _left(deadline: float) -> str:
    left = max(0, int(deadline - time.monotonic()))
    return f"{left // 60}:{left % 60:02d} left"
