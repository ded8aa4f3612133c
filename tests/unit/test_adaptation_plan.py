"""The adaptation benchmark: what is asked of whom, and what a user may give it to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_vllm.errors import AuroraError
from benchmarks.adaptation import __main__ as program
from benchmarks.adaptation.plan import ARMS, CROWD, LEARN, MEASURE, WORKLOADS, Sizes, make_plan, order
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
from demo.workload import Prompt, Workload, humaneval, split


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
    crowded = 2 * CROWD  # else sixteen would not run together for long
    assert all(len(slot.prompts) == (crowded if slot.concurrency == CROWD else sizes.window) for slot in slots)
    assert slots == make_plan(WORKLOADS, sizes, world(), ARMS, seed)
    shifted = [slot for slot in slots if slot.workload == "shift"]
    last = max(1, sizes.domain_windows // 3)
    assert sum(slot.part == MEASURE for slot in shifted) == 2 * last
    assert all({"aurora", "frozen"} <= set(slot.arms) for slot in shifted)
    assert all(("static" in slot.arms) == (slot.part == MEASURE) for slot in shifted)


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
        ({"static_draft": Path("none")}, "not a directory"),
        ({"learn_windows": 99}, "too few prompts"),
        ({"arms": "k0", "workloads": "crowd"}, "nothing to measure"),
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


def test_function_calls_are_asked_with_their_functions(tmp_path: Path) -> None:
    row = {"id": "s0", "question": [[{"role": "user", "content": "How far?"}]], "function": [{"name": "distance"}]}
    long = row | {"id": "s1", "function": [{"name": "x" * 3000}]}
    for name in ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json"):
        (tmp_path / name).write_text(json.dumps(row) + "\n" + json.dumps(long) + "\n")
    problems = function_calling(tmp_path)
    assert [prompt.problem for wordings in problems for prompt in wordings] == ["s0", "s0"]
    assert '{"name": "distance"}' in problems[0][0].text and "How far?" in problems[0][0].text
