"""The adaptation benchmark: who has the machine when, with servers that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aurora_vllm.errors import AuroraError
from benchmarks.adaptation import run as running
from benchmarks.adaptation.arms import Arm
from benchmarks.adaptation.figures import Window
from benchmarks.adaptation.plan import ARMS, LEARN, MEASURE, Sizes, Slot
from benchmarks.adaptation.prompts import (
    CODING,
)
from demo.servers import ServerFailed
from demo.workload import Prompt
from tests.unit.test_adaptation import window


def test_a_failed_server_is_quoted_where_it_says_why() -> None:
    assert (
        running.reason("server x ended:\nValueError: no such method\n  warnings.warn(1)")
        == "ValueError: no such method"
    )
    assert running.reason("it is\nnot up") == "not up"


class FakeServer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.states = iter(["training", "training", "training", "sleeping"])

    def status(self) -> dict[str, Any]:
        state = next(self.states, "waiting for traffic")
        return {"learner": {"alive": True, "pid": 0, "state": state}} if self.name == "aurora" else {}


class FakeFleet(dict):
    """What Run needs of a Fleet. ``broken`` servers do not come up."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.broken, self.events = broken, []

    def start(self, name: str, arguments: list[str]) -> None:
        self[name] = FakeServer(name)
        self.events.append(f"+{name}")

    def wait_up(self, names: list[str], *arguments: Any, **more: Any) -> None:
        if names[0] in self.broken:
            raise ServerFailed(f"server {names[0]} ended:\nno such method")

    def learner_paused(self, name: str) -> Any:
        return running.nullcontext()

    def stop(self, names: list[str]) -> None:
        for name in names:
            del self[name]
            self.events.append(f"-{name}")

    def close(self) -> None:
        self.stop(list(self))


def turns(
    slots: list[Slot], fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, exported: Path | None = None, idle_s: int = 0
) -> tuple[list[Window], dict[str, str]]:
    def fake(server: FakeServer, arm: str, slot: Slot, number: int, first: int, *_: Any) -> Window:
        fleet.events.append(arm)
        return window(number, arm, 1, 1.0, first_request=first)

    monkeypatch.setattr(running, "measure", fake)
    monkeypatch.setattr(running, "load", lambda: None)
    absent: dict[str, str] = {}
    arms = {name: Arm(name, (), optional=name not in ("plain", "aurora")) for name in ARMS}
    written: list[int] = []
    run = running.Run(
        slots, Sizes(idle_s=idle_s), 0, arms, absent, fleet, Path("m"), (), Path("c"), exported, Console(quiet=True),  # type: ignore[arg-type]
        lambda windows: written.append(len(windows)),
    )  # fmt: skip
    run.run()
    assert written == list(range(1, len(run.windows) + 1))  # after every one
    return run.windows, absent


def slot(*arms: str) -> Slot:
    return Slot("day0", MEASURE, CODING, (Prompt("p", "?"),) * 3, 1, 0.0, arms)


def test_arms_take_turns_and_servers_live_only_while_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = FakeFleet()
    windows, absent = turns([slot("plain", "k0"), slot("plain", "aurora"), slot("plain", "aurora")], fleet, monkeypatch)
    expected = [
        "+plain",
        "+k0",
        "plain",
        "k0",
        "-k0",
        "+aurora",
        "aurora",
        "plain",
        "plain",
        "aurora",
        "-plain",
        "-aurora",
    ]
    assert fleet.events == expected
    assert not absent
    assert [(w.slot, w.first_request) for w in windows if w.arm == "aurora"] == [(1, 0), (2, 3)]


def test_the_run_goes_on_without_an_arm_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = FakeFleet(broken=("ngram",))
    windows, absent = turns([slot("plain", "ngram"), slot("plain", "ngram")], fleet, monkeypatch)
    assert [w.arm for w in windows] == ["plain", "plain"]
    assert absent == {"ngram": "no such method"}
    assert fleet.events.count("+ngram") == 1
    broken = FakeFleet(broken=("plain",))
    with pytest.raises(ServerFailed):
        turns([slot("plain")], broken, monkeypatch)
    assert not broken  # and nothing is left running


def test_the_learner_catches_up_once_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = FakeFleet()
    monkeypatch.setattr(running.time, "sleep", lambda seconds: fleet.events.append(f"rest {seconds:g}"))
    turns([replace(slot("aurora"), part=LEARN), slot("aurora"), slot("aurora")], fleet, monkeypatch, idle_s=60)
    # The first of its four states is read when it starts.
    assert fleet.events == ["+aurora", "aurora", "rest 1", "rest 1", "aurora", "aurora", "-aurora"]
    fleet = FakeFleet()
    turns([slot("aurora")], fleet, monkeypatch)
    assert fleet.events == ["+aurora", "aurora", "-aurora"]


def test_the_static_draft_is_what_is_served_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["old", "old", "old", "new"])
    looked: list[str] = []
    fleet = FakeFleet()
    monkeypatch.setattr(running, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(running.checkpoints, "newest", lambda kept: looked.append(next(looks)) or looked[-1])
    monkeypatch.setattr(running, "export", lambda kept, out, form: fleet.events.append(f"export {looked[-1]}"))
    turns([slot("aurora"), slot("static", "aurora")], fleet, monkeypatch, Path("s"))
    assert fleet.events[:4] == ["+aurora", "aurora", "export new", "+static"]

    def nothing(*_: Any) -> None:
        raise AuroraError("there is no checkpoint")

    monkeypatch.setattr(running, "export", nothing)
    windows, absent = turns([slot("static", "plain")], FakeFleet(), monkeypatch, Path("s"))
    assert [w.arm for w in windows] == ["plain"] and "nothing was learned" in absent["static"]
