"""The run: servers are started when first needed, get their windows in turn, and are ended after their last one.

One arm at a time has the machine. While another arm is measured, or a server starts, aurora's learner is stopped
(SIGSTOP), so it cannot use CPU time that others leave. During aurora's own turns it runs, so aurora's figures are net.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from aurora_vllm.errors import AuroraError
from aurora_vllm.export import export
from aurora_vllm.learner import checkpoints
from benchmarks.adaptation.arms import CHECKPOINT_EVERY_S, Arm
from benchmarks.adaptation.client import load
from benchmarks.adaptation.figures import Window
from benchmarks.adaptation.measure import measure
from benchmarks.adaptation.plan import CROWD, LEARN_CONCURRENCY, MEASURE, Sizes, Slot, order
from demo.fleet import Fleet
from demo.servers import ServerFailed
from demo.serving import START_S, flags

LEARNING = "aurora"
EXPORTED = ("static", "frozen")  # arms that serve aurora's draft as it is when the first of them starts
LEARNER_START_S = 120.0
DONE = ("waiting for traffic", "sleeping")  # states of a learner that has nothing left to do
SAVE_S = 5.0  # longest wait for a checkpoint, as the learner has the machine to itself meanwhile


class Run:
    """All turns of a plan.

    Args:
        arms: by name.
        absent: arms that do not run, with reasons; those that fail during the run are added.
        model: the target's directory.
        more_flags: of all servers, in addition.
        kept: the learning arm's checkpoint directory.
        exported: where the static draft is exported to; None if one was given.
        written: called after every window with all windows so far.
    """

    def __init__(
        self, slots: Sequence[Slot], sizes: Sizes, seed: int, arms: Mapping[str, Arm], absent: dict[str, str],
        fleet: Fleet, model: Path, more_flags: Sequence[str], kept: Path, exported: Path | None,
        console: Console, written: Callable[[list[Window]], None],
    ) -> None:  # fmt: skip
        self._slots, self._sizes, self._seed, self._arms, self._absent = slots, sizes, seed, arms, absent
        self._fleet, self._console, self._written = fleet, console, written
        self._command = [str(model), *flags(max_num_seqs=CROWD), *more_flags]
        self._checkpoints, self._exported, self._is_exported = kept, exported, False
        self.windows: list[Window] = []
        self._has_caught_up = False
        self._asked = 0  # requests sent to the learning arm

    def run(self) -> None:
        """Run the whole plan; no server is left when this returns or raises.

        Raises:
            ServerFailed, httpx.HTTPError: a server that is not optional ended or refused its requests.
        """
        turns = sum(len(slot.arms) for slot in self._slots)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        # With Progress's own redirection, the client's output would appear on the screen.
        shown = Progress(*columns, console=self._console, redirect_stdout=False, redirect_stderr=False)
        try:
            with shown as progress:
                bar = progress.add_task("starting", total=turns)
                load()
                for number, slot in enumerate(self._slots):
                    self._take(number, slot, lambda text, done=0: progress.update(bar, description=text, advance=done))
        finally:
            self._fleet.close()

    def _take(self, number: int, slot: Slot, say: Callable[..., None]) -> None:
        self._start([arm for arm in slot.arms if arm not in self._fleet and arm not in self._absent], say)
        takers = [arm for arm in slot.arms if arm in self._fleet]
        if slot.part == MEASURE and not self._has_caught_up:
            self._catch_up(say)
        first_request = self._asked
        taken: dict[str, Window] = {}
        for arm in order(takers, number):
            say(f"{number + 1}/{len(self._slots)} {describe(slot)}: {self._arms[arm].label}")
            with nullcontext() if arm == LEARNING else self._fleet.learner_paused(LEARNING):
                taken[arm] = measure(
                    self._fleet[arm], arm, slot, number, first_request, self._sizes.answer_tokens, self._seed,
                    self._arms[arm].is_aurora,
                )  # fmt: skip
            self._asked += len(slot.prompts) if arm == LEARNING else 0
            self.windows.append(taken[arm])
            with self._fleet.learner_paused(LEARNING):
                self._written(self.windows)
            say(f"{number + 1}/{len(self._slots)} {describe(slot)}", done=1)
        self._console.print(line(number, slot, taken), highlight=False, soft_wrap=True)
        later = {arm for slot in self._slots[number + 1 :] for arm in slot.arms}
        if done := [arm for arm in takers if arm not in later]:
            self._fleet.stop(done)

    def _start(self, names: Sequence[str], say: Callable[..., None]) -> None:
        """Start these arms; an optional arm that does not come up is left out from now on."""
        if set(names) & set(EXPORTED) and not self._is_exported:
            self._is_exported = self._export(say)
            names = [name for name in names if self._is_exported or name not in EXPORTED]
        with self._fleet.learner_paused(LEARNING):
            for name in names:
                self._fleet.start(name, [*self._command, *self._arms[name].arguments])
            started = [name for name in names if name in self._fleet]
            say(f"starting {', '.join(self._arms[name].label for name in started)}")
            for name in started:
                try:
                    self._fleet.wait_up([name], START_S * len(started), lambda _: None, warm_up=LEARN_CONCURRENCY)
                except ServerFailed as error:
                    if not self._arms[name].optional:
                        raise
                    self._fleet.stop([name])
                    self._leave_out(name, reason(str(error)))
        if LEARNING in names:
            self._await_learner(say)

    def _await_learner(self, say: Callable[..., None]) -> None:
        """Wait until the learner has started: that takes seconds of CPU, which no window should include."""
        deadline = time.monotonic() + LEARNER_START_S
        while not (status := self._fleet[LEARNING].status()) or not status["learner"]["alive"]:
            if time.monotonic() > deadline:
                raise ServerFailed(f"the learner is not up after {LEARNER_START_S:.0f} s")
            say("starting the learner")
            time.sleep(0.5)

    def _catch_up(self, say: Callable[..., None]) -> None:
        """No traffic for a while, as at night: the learner has the machine."""
        self._has_caught_up = True
        deadline = time.monotonic() + self._sizes.idle_s
        while LEARNING in self._fleet and time.monotonic() < deadline:
            state = self._fleet[LEARNING].status().get("learner", {}).get("state", "")
            if state in DONE:
                break
            say(f"no traffic, the learner is {state}")
            time.sleep(1.0)

    def _export(self, say: Callable[..., None]) -> bool:
        """Export the draft that is served now for the static arms; an older one would be too weak a baseline."""
        if self._exported is None:
            return True
        if LEARNING in self._fleet:
            say("exporting the static draft")
            with self._fleet.learner_paused(LEARNING):
                time.sleep(CHECKPOINT_EVERY_S)  # a checkpoint becomes due while nothing is learned
            before, deadline = checkpoints.newest(self._checkpoints), time.monotonic() + SAVE_S
            while checkpoints.newest(self._checkpoints) == before and time.monotonic() < deadline:
                time.sleep(0.05)  # none is written if nothing was learned since the last
        try:
            export(self._checkpoints, self._exported, "eagle3")
        except AuroraError as error:
            for name in EXPORTED:
                self._leave_out(name, f"nothing was learned by then ({error})")
            return False
        return True

    def _leave_out(self, name: str, reason: str) -> None:
        self._absent[name] = reason
        self._console.print(f"without {self._arms[name].label}: {reason}", style="yellow", highlight=False)


def reason(text: str) -> str:
    """The line of a failed server's log that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])


def describe(slot: Slot) -> str:
    """A slot in a few words."""
    domain = "" if slot.domain == slot.workload else f", {slot.domain}"
    warm = f", T={slot.temperature:g}" if slot.temperature else ""
    return f"{slot.workload}{domain}, concurrency {slot.concurrency}{warm}"


def line(number: int, slot: Slot, taken: Mapping[str, Window]) -> str:
    """A slot's results, in one line."""
    parts = [f"{number + 1:>2} {describe(slot)}"]
    for arm, window in taken.items():
        part = f"{arm} {window.rate:.1f} tok/s"
        if "plain" in taken and arm != "plain":
            part += f" ({window.rate / taken['plain'].rate:.2f}x)"
        if window.failed:
            part += f", {window.failed} requests failed"
        parts.append(part)
    ours = taken.get(LEARNING)
    if ours is not None and ours.learner:
        newest = f", draft v{ours.versions[-1]['version']}" if ours.versions else ""
        length = f"{ours.draft_lengths[-1][1]:.0f}" if ours.draft_lengths else "?"
        share = ours.learner["cpu_share"]
        parts.append(f"K={length}{newest}, {len(ours.swaps)} swaps, learner {share:.0%} of a CPU")
    return " | ".join(parts)
