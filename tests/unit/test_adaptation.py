"""The adaptation benchmark without a model: which prompts go where, what a window says, and the figures of windows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.adaptation.figures import Window, by_version, figures, pairs, table
from benchmarks.adaptation.measure import account, latencies, versions
from benchmarks.adaptation.plan import ARMS, LEARN, MEASURE
from benchmarks.adaptation.plot import plot
from benchmarks.adaptation.prompts import (
    CODING,
    FUNCTIONS,
)
from benchmarks.results_page import PAGE, SOURCE, committed_page, page

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
    assert values["over_plain"] == pytest.approx((700 / 28) / (600 / 32))
    assert spread["worst_window_ratio"] == spread["over_plain"] == pytest.approx([0.9, 2.0, 5 / 3, 1.1])
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
    some[0] = replace(some[0], copied={"drafts": 5, "acceptance_length": 3.0})
    assert by_version(some, "aurora")[-1] == {"version": "copies", "drafts": 5, "acceptance_length": 3.0}


def status(live: int, steps: int, rows: list[tuple[int, int, int]], learner: str = "training") -> dict[str, Any]:
    table = [{"version": v, "num_drafts": d, "num_accepted": a} for v, d, a in rows]
    return {
        "versions": {"live": live, "acceptance": table},
        "speculation": {
            "steps": steps,
            "spec_steps": steps // 2,
            "copied_drafts": steps // 10,
            "copied_accepted": steps // 5,
        },
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
    assert found["copied"] == {"drafts": 10, "acceptance_length": 3.0}
    assert account(before, status(1, 100, []), [], 10.0, 0.0)["copied"] == {}
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
    assert "takes longer" not in text


def test_a_deeper_target_has_a_section_of_its_own_with_what_was_measured_alone() -> None:
    plain = json.loads(json.dumps(report(WINDOWS)))
    shown = page(plain, plain | {"deeper": 60})
    assert shown.startswith(page(plain).rstrip("\n"))
    section = shown.removeprefix(page(plain).rstrip("\n"))
    assert "with 60 more layers" in section and "**1.562**" in section and "not run" not in section


def test_the_committed_page_is_that_of_the_committed_report() -> None:
    if not SOURCE.is_file():
        assert not PAGE.exists(), "docs/results.md is generated from benchmarks/results/adaptation.json"
        return
    assert PAGE.read_text(encoding="utf-8") == committed_page(), "run python -m benchmarks.results_page"
    committed = json.loads(SOURCE.read_text(encoding="utf-8"))
    assert committed["figures"] == pytest.approx(figures([Window(**one) for one in committed["windows"]])[0])


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    some = [*WINDOWS, replace(WINDOWS[3], slot=9, swaps=[3.0], temperature=1.0)]
    plot(some, {arm: arm for arm in ARMS}, tmp_path / "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a_speedups.png"}
    plot(WINDOWS[:1], {arm: arm for arm in ARMS}, tmp_path / "one.json")
