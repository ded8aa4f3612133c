"""The adaptation benchmark without a model: which prompts go where, what a window says, and the figures of windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aurora_vllm.errors import AuroraError
from benchmarks.adaptation import __main__ as program
from benchmarks.adaptation import run as running
from benchmarks.adaptation.arms import Arm
from benchmarks.adaptation.figures import Window, by_version, figures, pairs, table
from benchmarks.adaptation.measure import account, latencies, versions
from benchmarks.adaptation.plan import ARMS, LEARN, MEASURE, WORKLOADS, Sizes, Slot, make_plan, order
from benchmarks.adaptation.plot import plot
from benchmarks.adaptation.prompts import (
    CODING,
    FILE,
    FUNCTIONS,
    MATHEMATICS,
    UNSEEN_SHARE,
    WORDINGS,
    from_file,
    function_calling,
)
from benchmarks.results_page import PAGE, SOURCE, page
from demo.servers import ServerFailed
from demo.workload import Prompt, Workload, humaneval, split

MS = {"mean": 20.0, "p50": 20.0, "p99": 40.0}


def window(slot: int, arm: str, tokens: int, seconds: float, **more: Any) -> Window:
    fields: dict[str, Any] = {
        "workload": "day0", "part": MEASURE, "domain": CODING, "concurrency": 1, "temperature": 0.0,
        "first_request": 0, "requests": 50, "failed": 0, "ttft_ms": MS, "tpot_ms": MS, "itl_ms": MS,
    }  # fmt: skip
    return Window(slot=slot, arm=arm, tokens=tokens, seconds=seconds, **(fields | more))


# Slot 0 is learning, 1 and 2 are measured at concurrency 1, 3 at 4, 4 and 5 after a shift.
WINDOWS = [
    window(0, "plain", 100, 10.0, part=LEARN, concurrency=4),
    window(0, "k0", 99, 10.0, part=LEARN, concurrency=4),
    window(0, "aurora", 90, 10.0, part=LEARN, concurrency=4),
    window(1, "aurora", 200, 10.0),
    window(1, "plain", 100, 10.0),
    window(1, "suffix", 160, 10.0),
    window(2, "plain", 300, 10.0),
    window(2, "aurora", 300, 6.0),
    window(3, "plain", 100, 2.0, concurrency=4),
    window(3, "aurora", 110, 2.0, concurrency=4),
    window(4, "aurora", 150, 10.0, workload="shift", domain=FUNCTIONS),
    window(4, "static", 100, 10.0, workload="shift", domain=FUNCTIONS),
    window(5, "aurora", 50, 10.0, workload="shift", domain=FUNCTIONS, part=LEARN),
    window(5, "static", 100, 10.0, workload="shift", domain=FUNCTIONS, part=LEARN),
]


def test_figures_of_hand_counted_windows() -> None:
    values, spread = figures(WINDOWS)
    # Slots: 0.9, 2.0, 50/30, 1.1.
    assert values["worst_window_ratio"] == pytest.approx(0.9)
    assert spread["worst_window_ratio"] == pytest.approx([0.9, 2.0, 5 / 3, 1.1])
    # All tokens over all seconds: (200+300)/16 over (100+300)/20, not a mean of ratios.
    assert values["day0_speedup_c1"] == pytest.approx(31.25 / 20)
    assert values["day0_speedup_c4"] == pytest.approx(1.1)  # slot 0 is at concurrency 4 too, and not measured
    assert values["shift_speedup"] == pytest.approx(1.5)  # without slot 5
    assert values["shift_speedup_function_calling"] == pytest.approx(1.5)
    assert values["k0_ratio"] == pytest.approx(0.99)
    assert values["over_suffix"] == pytest.approx(1.25)
    assert values.keys() == spread.keys()


def test_a_figure_whose_windows_were_not_run_is_absent() -> None:
    assert figures([]) == ({}, {})
    alone = [w for w in WINDOWS if w.arm != "plain"]
    values, _ = figures(alone)
    assert set(values) == {"shift_speedup", "shift_speedup_function_calling", "over_suffix"}
    apart = [window(1, "aurora", 9, 1.0), window(2, "plain", 9, 1.0)]  # not the same prompts
    assert figures(apart)[0] == {}
    failed = [window(1, "aurora", 9, 1.0, failed=1), window(1, "plain", 9, 1.0)]  # not the same requests answered
    assert figures(failed)[0] == {}


@given(st.lists(st.tuples(st.integers(1, 999), st.floats(0.1, 99), st.floats(0.1, 99)), min_size=1, max_size=9))
def test_a_pooled_ratio_lies_between_its_windows(slots: list[tuple[int, float, float]]) -> None:
    some = [
        one
        for i, (tokens, ours, theirs) in enumerate(slots)
        for one in (window(i, "aurora", tokens, ours), window(i, "plain", tokens, theirs))
    ]
    values, spread = figures(some)
    ratios = spread["day0_speedup_c1"]
    assert min(ratios) * (1 - 1e-9) <= values["day0_speedup_c1"] <= max(ratios) * (1 + 1e-9)
    assert values["worst_window_ratio"] == min(ratios)
    assert len(pairs(some, "aurora", "plain")) == len(slots)


def test_the_table_compares_only_what_both_ran() -> None:
    rows = {(row["workload"], row["part"], row["concurrency"], row["arm"]): row for row in table(WINDOWS)}
    aurora, suffix = rows["day0", MEASURE, 1, "aurora"], rows["day0", MEASURE, 1, "suffix"]
    assert aurora["over_plain"] == pytest.approx(31.25 / 20)
    assert suffix["over_plain"] == pytest.approx(1.6)  # of slot 1 alone
    assert rows["shift", MEASURE, 1, "aurora"]["over_plain"] is None
    assert aurora["tpot_p99_ms"] == 40.0


def test_acceptance_by_version_is_weighed_by_drafts() -> None:
    rows = [
        [{"version": 2, "drafts": 10, "acceptance_length": 1.5}],
        [{"version": 2, "drafts": 30, "acceptance_length": 1.9}],
    ]
    some = [replace(window(i, "aurora", 1, 1.0), versions=row) for i, row in enumerate(rows)]
    assert by_version(some, "aurora") == [{"version": 2, "drafts": 40, "acceptance_length": pytest.approx(1.8)}]
    assert by_version(some, "static") == []


def status(live: int, steps: int, rows: list[tuple[int, int, int]], learner: str = "training") -> dict[str, Any]:
    table = [{"version": v, "num_drafts": d, "num_accepted": a} for v, d, a in rows]
    return {
        "versions": {"live": live, "acceptance": table},
        "speculation": {"steps": steps, "spec_steps": steps // 2},
        "learner": {"state": learner, "step": steps, "message": ""},
    }


def test_a_window_is_what_changed_in_the_status() -> None:
    before, after = status(1, 100, [(1, 50, 20)]), status(3, 200, [(1, 60, 26), (2, 0, 0), (3, 10, 9)])
    samples = [(1.0, 0, 1), (2.0, 3, 1), (3.0, 3, 2), (4.0, 3, 3)]
    found = account(before, after, samples, 10.0, 1.5)
    assert found["versions"] == [
        {"version": 1, "drafts": 10, "acceptance_length": pytest.approx(1.6)},
        {"version": 3, "drafts": 10, "acceptance_length": pytest.approx(1.9)},
    ]
    assert found["draft_lengths"] == [[1.0, 0], [2.0, 3]]
    assert found["swaps"] == [3.0, 4.0]
    assert found["drafting_share"] == 0.5
    assert found["learner"] == {"cpu_share": 0.15, "steps": 100, "state": "training", "message": ""}
    assert account(before, status(1, 200, [], "off"), [], 10.0, 0.0)["learner"] == {}
    assert account({}, {}, [], 10.0, 0.0) == {}
    assert versions([], []) == []


def test_latencies_are_of_answered_requests() -> None:
    result = {
        "output_lens": [11, 0, 1], "ttfts": [0.1, 9.0, 0.3], "latencies": [1.1, 9.0, 0.3],
        "itls": [[0.5, 0.5], [9.0], []],
    }  # fmt: skip
    found = latencies(result)
    assert found["ttft_ms"]["mean"] == pytest.approx(200.0)
    assert found["tpot_ms"] == {"mean": 100.0, "p50": 100.0, "p99": 100.0}  # one second over ten tokens
    assert found["itl_ms"]["p50"] == 500.0


def world(coding: int = 700, others: int = 400) -> dict[str, Workload]:
    def prompts(name: str, count: int) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{name}{i}", f"{name} {i}") for i in range(count))

    sizes = {CODING: coding, FUNCTIONS: others, MATHEMATICS: others}
    return {name: Workload(prompts(name, size), prompts(f"unseen {name}", size)) for name, size in sizes.items()}


def test_the_default_plan_measures_requests_300_to_400_of_one_domain() -> None:
    slots = make_plan(WORKLOADS, Sizes(), world(), ARMS, 0)
    asked, measured = 0, []
    for slot in slots:
        if (slot.workload, slot.part, slot.concurrency) == ("day0", MEASURE, 1):
            measured.append((asked, asked + len(slot.prompts)))
            assert all(prompt.problem.startswith("unseen") for prompt in slot.prompts)
        asked += len(slot.prompts) * ("aurora" in slot.arms)
    assert measured == [(300, 350), (350, 400)]
    assert {slot.concurrency for slot in slots} == {1, 4, 16}
    assert {slot.temperature for slot in slots} == {0.0, 1.0}
    assert {arm for slot in slots for arm in slot.arms} == set(ARMS)
    for workload in WORKLOADS:  # the worst window is over all of them
        assert any({"plain", "aurora"} <= set(slot.arms) for slot in slots if slot.workload == workload)
    assert all(not {"ngram", "suffix"} & set(slot.arms) for slot in slots if slot.temperature)


@given(
    st.builds(
        Sizes, window=st.integers(1, 12), learn_windows=st.integers(0, 5), measure_windows=st.integers(0, 3),
        domain_windows=st.integers(1, 5), other_windows=st.integers(0, 2), plain_every=st.integers(1, 3),
    ),
    st.integers(0, 99),
)  # fmt: skip
def test_no_prompt_is_sent_twice_and_windows_are_whole(sizes: Sizes, seed: int) -> None:
    slots = make_plan(WORKLOADS, sizes, world(), ARMS, seed)
    texts = [prompt.text for slot in slots for prompt in slot.prompts]
    assert len(set(texts)) == len(texts)
    assert all(len(slot.prompts) == sizes.window for slot in slots)
    assert slots == make_plan(WORKLOADS, sizes, world(), ARMS, seed)
    shifted = [slot for slot in slots if slot.workload == "shift"]
    last = max(1, sizes.domain_windows // 3)
    assert sum(slot.part == MEASURE for slot in shifted) == 2 * last
    assert all({"aurora", "static"} <= set(slot.arms) for slot in shifted)


def test_coding_alone_is_enough_for_the_default_plan() -> None:
    coding = split(humaneval(WORDINGS), 0, UNSEEN_SHARE)
    slots = make_plan(WORKLOADS, Sizes(), {CODING: coding}, ARMS, 0)
    assert {slot.workload for slot in slots} == {"day0", "sampled", "crowd"}
    learned = {prompt.problem for slot in slots if slot.part == LEARN for prompt in slot.prompts}
    measured = {
        prompt.problem for slot in slots if slot.workload == "day0" and slot.part == MEASURE for prompt in slot.prompts
    }
    assert not learned & measured


def test_a_plan_that_cannot_be_says_so() -> None:
    with pytest.raises(AuroraError, match="domain coding has too few prompts"):
        make_plan(["day0"], Sizes(), world(coding=299), ARMS, 0)
    with pytest.raises(AuroraError, match="name both"):
        make_plan(["shift"], Sizes(), world(), ARMS, 0)
    assert order("abc", 0) == ["a", "b", "c"] and order("abc", 1) == ["c", "b", "a"]


def test_a_file_of_prompts_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(5)] + ["", json.dumps({"turns": ["p5", "and then"]})]
    path.write_text("\n".join(lines))
    workload = from_file(path)
    assert [prompt.text for prompt in workload.learn] == [f"p{i}" for i in range(6)]
    slots = make_plan([FILE], Sizes(window=2), {FILE: workload}, ["plain", "aurora"], 0)
    assert [(slot.part, slot.concurrency) for slot in slots] == [(LEARN, 4), (LEARN, 4), (MEASURE, 1)]
    assert [prompt.text for slot in slots for prompt in slot.prompts] == [f"p{i}" for i in range(6)]


@pytest.mark.parametrize(
    "line", ["no json", "[]", '"text"', "{}", '{"prompt": 3}', '{"prompt": " "}', '{"turns": []}', '{"turns": [1]}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(AuroraError, match="line 3: ") as caught:
        from_file(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(AuroraError, match="cannot be read"):
        from_file(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AuroraError, match="no prompts"):
        from_file(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(AuroraError, match="not UTF-8"):
        from_file(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompts": Path("p.jsonl")}, "line 1: "),
        ({"arms": "plain,aurorra"}, "the nearest is aurora"),
        ({"workloads": "shift"}, "name both"),
        ({"static_draft": Path("none")}, "no directory"),
        ({"learn_windows": 99}, "too few prompts"),
        ({"arms": "k0", "workloads": "crowd"}, "nothing is left to measure"),
    ],
)
def test_bad_input_is_one_line_and_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "end_on_signals", lambda: None)
    monkeypatch.setattr(program, "_measure", lambda *_: pytest.fail("it went on"))
    Path("p.jsonl").write_text("Hello!\n")
    with pytest.raises(SystemExit) as ended:
        program.main(**wrong)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_a_failed_server_is_quoted_where_it_says_why() -> None:
    assert (
        running.reason("server x ended:\nValueError: no such method\n  warnings.warn(1)")
        == "ValueError: no such method"
    )
    assert running.reason("it is\nnot up") == "not up"


def test_function_calls_are_asked_with_their_functions(tmp_path: Path) -> None:
    row = {"id": "s0", "question": [[{"role": "user", "content": "How far?"}]], "function": [{"name": "distance"}]}
    long = row | {"id": "s1", "function": [{"name": "x" * 3000}]}
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        (tmp_path / name).write_text(json.dumps(row) + "\n" + json.dumps(long) + "\n")
    problems = function_calling(tmp_path)
    assert [prompt.problem for wordings in problems for prompt in wordings] == ["s0", "s0"]
    assert '{"name": "distance"}' in problems[0][0].text and "How far?" in problems[0][0].text


class FakeServer:
    def __init__(self, name: str) -> None:
        self.name = name

    def status(self) -> dict[str, Any]:
        return {"learner": {"alive": True, "pid": 0}} if self.name == "aurora" else {}


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
    slots: list[Slot], fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch, exported: Path | None = None
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
        slots, Sizes(), 0, arms, absent, fleet, Path("m"), (), Path("c"), exported, Console(quiet=True),  # type: ignore[arg-type]
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


def report(windows: list[Window]) -> dict[str, Any]:
    values, spread = figures(windows)
    return {
        "figures": values, "spread": spread, "seed": 0, "date": "today", "command": "python -m benchmarks.adaptation",
        "machine": {"cores": 2, "cpu": "a processor", "memory_gib": 8.0}, "versions": {"commit": "abc", "torch": "2"},
        "complete": False, "absent": {"suffix": "not installed"}, "sizes": {"window": 50, "answer_tokens": 64},
        "eager": False, "arms": {"k0": {"label": "off", "arguments": ["--a", "b c"]}}, "table": table(windows),
        "windows": [vars(one) for one in windows],
    }  # fmt: skip


def test_the_page_says_what_the_report_says() -> None:
    text = page(json.loads(json.dumps(report(WINDOWS))))
    assert (
        "| `day0_speedup_c1` | one domain, concurrency 1, after learning: aurora over plain vLLM | **1.562** |" in text
    )
    assert "`over_ngram` | aurora over n-gram, same windows | not run |" in text
    assert "suffix: not installed" in text and "cut short" in text
    assert "2 cores of a processor" in text and "- `k0`: off, `--a 'b c'`" in text


def test_the_committed_page_is_that_of_the_committed_report() -> None:
    if not SOURCE.is_file():
        assert not PAGE.exists(), "docs/results.md is generated from benchmarks/results/adaptation.json"
        return
    committed = json.loads(SOURCE.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(committed), "run python -m benchmarks.results_page"
    assert committed["figures"] == pytest.approx(figures([Window(**one) for one in committed["windows"]])[0])


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    some = [*WINDOWS, replace(WINDOWS[3], slot=9, swaps=[3.0], temperature=1.0)]
    plot(some, {arm: arm for arm in ARMS}, tmp_path / "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a_speedups.png"}
    plot(WINDOWS[:1], {arm: arm for arm in ARMS}, tmp_path / "one.json")
