"""Copies on the device: the kernels, in Triton's interpreter, against a model of dictionaries."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.control.copy_counts import COPIED, ORDERS
from aurora_vllm.spec_decode import device_copies
from aurora_vllm.spec_decode.copy_tables import MOST_TOKENS, answers_entries, device_bytes
from tests.unit.copies_world import (
    DRAFT,
    SLOTS,
    VOCABULARY,
    Naive,
    Straw,
    expected,
)

TOKENS = st.integers(0, 2)
EMIT = st.tuples(st.just("emit"), st.integers(0, 3), st.lists(TOKENS, min_size=1, max_size=4))
EVENTS = st.lists(
    st.one_of(
        EMIT,
        st.tuples(st.just("arrive"), st.lists(TOKENS, min_size=1, max_size=12), st.booleans(), st.booleans()),
        EMIT,
        st.tuples(st.just("leave"), st.integers(0, 3)),
        st.tuples(st.just("preempt"), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.integers(0, 3)),
    ),
    min_size=8,
    max_size=24,
)


@settings(max_examples=60)
@given(events=EVENTS)
def test_proposes_what_dictionaries_would(events: list[Any]) -> None:
    """Whoever comes, emits, is preempted, ends, and comes into the place of another."""
    straw, naive = Straw(), Naive(3)
    for number, (what, *rest) in enumerate(events):
        names = list(straw.running)
        if what == "arrive":
            if len(names) < SLOTS:
                prompt, salted, learn = rest
                straw.arrive(f"r{number}", prompt, "mine" if salted else None, learn)
            continue
        if not names:
            continue
        name = names[rest[0] % len(names)]
        if what == "leave":
            straw.leave(name)
        elif what == "preempt":
            straw.preempt(name)
        elif what == "wait":
            assert straw.step({name: []})[name] == expected([])  # nothing is proposed inside a prompt
        else:
            proposed = straw.step({name: rest[1]})
            request = straw.running[name]
            naive.learn(request)
            assert proposed[name] == expected(naive.propose(request)[0])


@settings(max_examples=8)
@given(texts=st.lists(st.lists(TOKENS, min_size=14, max_size=14), min_size=2, max_size=3), positions=st.integers(1, 8))
def test_requests_side_by_side(texts: list[list[int]], positions: int) -> None:
    """In one batch, each with a copy as long as a proposal may be."""
    straw, naive = Straw(positions), Naive(positions)
    for i, text in enumerate(texts):
        straw.arrive(str(i), text[:8], temperature=float(i % 2))
    for at in range(8, 14):
        proposed = straw.step({str(i): [text[at]] for i, text in enumerate(texts)}, length=positions)
        for request in straw.running.values():
            naive.learn(request)
        for name, request in straw.running.items():
            copy, _ = naive.propose(request)
            assert proposed[name][: len(copy)] == copy
            assert proposed[name][len(copy) :] == list(range(DRAFT + len(copy), DRAFT + positions))


def test_a_prompt_longer_than_what_one_program_learns() -> None:
    text = list(range(10, 80)) * 4
    straw = Straw()
    straw.arrive("long", text)
    assert straw.step({"long": [10]})["long"] == [11, 12, 13]


def test_of_a_very_long_prompt_the_end_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "WINDOW", 20)
    straw = Straw()
    straw.arrive("long", [1, 2, 3, 4, *range(10, 40), 5, 6, 7, 5])
    assert straw.step({"long": [6]})["long"][0] == 7
    assert straw.step({"long": [1]})["long"] == expected([])
    assert straw.step({"long": [2]})["long"] == expected([])  # 1 2 3 stood before the window


ANSWER = [11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("first", "second", "copies"),
    [
        ({}, {}, True),
        ({"learn": False}, {}, False),
        ({"salt": "a"}, {}, False),
        ({}, {"learn": False}, True),  # taking is no learning
        ({}, {"salt": "a"}, False),
        ({"salt": "a"}, {"salt": "a"}, False),
    ],
)
def test_who_leaves_an_answer_and_who_takes_it(first: dict[str, Any], second: dict[str, Any], copies: bool) -> None:
    straw = Straw()
    straw.arrive("first", [1, 2, 3], **first)
    for token in ANSWER:
        straw.step({"first": [token]})
    straw.leave("first")
    straw.arrive("second", [7, 8, 9], **second)
    straw.step({"second": [11]})
    assert straw.step({"second": [12]})["second"] == expected(ANSWER[2:] if copies else [])


def test_prompts_are_nobody_elses() -> None:
    straw = Straw()
    straw.arrive("first", ANSWER)
    straw.step({"first": [99]})
    straw.arrive("second", [7, 8, 11, 12])
    assert straw.step({"second": [13]})["second"] == expected([])


def test_what_stands_before_a_text_is_no_context() -> None:
    """Nothing stands there; a token 0 does not either."""
    straw = Straw()
    straw.arrive("first", [9, 9, 9])
    for token in (0, 5, 6, 7, 8, 1, 5, 9):
        straw.step({"first": [token]})
    straw.arrive("second", [])
    assert straw.step({"second": [5]})["second"] == [9, DRAFT + 1, DRAFT + 2]  # after 5 alone, not after 0 and 5
    assert straw.step({"second": [6]})["second"] == [7, 8, 1]


def test_what_is_no_token_of_the_vocabulary_is_not_proposed() -> None:
    """A multimodal prompt has something else in its places."""
    straw = Straw()
    straw.arrive("a", [1, 2, VOCABULARY, 4, 1, 2, -1, 4, VOCABULARY - 1, 1])
    assert straw.step({"a": [2]})["a"] == expected([])
    straw.step({"a": [VOCABULARY - 2]})
    assert straw.step({"a": [4]})["a"] == [VOCABULARY - 1, 1, 2]
    straw.step({"a": [4]})
    assert straw.step({"a": [VOCABULARY - 1]})["a"][0] == 1


def test_without_earlier_answers_only_the_own_text_is_copied() -> None:
    straw = Straw(answers=0)
    straw.arrive("first", [1, 2, 3])
    for token in [*ANSWER, *ANSWER[:2]]:
        proposed = straw.step({"first": [token]})
    assert proposed["first"] == ANSWER[2:]
    straw.arrive("second", [7, 8, 9, 11])
    assert straw.step({"second": [12]})["second"] == expected([])


def test_the_draft_s_tokens_stay_where_they_are_preferred_and_behind_a_short_copy() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4, 1])
    assert straw.step({"a": [2]}, preferred=0)["a"] == expected([])
    assert straw.step({"a": [3]})["a"] == [4, 1, 2]
    straw.arrive("b", [5, 6, 7, 5])
    assert straw.step({"b": [6]}, length=2)["b"] == [7, 5, DRAFT + 2]  # what is not verified is left alone


def test_without_the_draft_a_proposal_is_filled_up_with_a_token() -> None:
    """vLLM verifies as many tokens of each request: -1 among them would be read as one."""
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4])
    assert straw.step({"a": [9]}, drafted_by=None, preferred=0)["a"] == [9, 9, 9]
    straw.arrive("b", [1, 2, 3, 1])
    assert straw.step({"b": [2]}, drafted_by=None, preferred=0)["b"] == [3, 1, 2]


def test_verdicts_are_counted_for_who_proposed() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4, 1])
    straw.step({"a": [2]}, preferred=0, drafted_by=7)  # the draft's
    straw.step({"a": [DRAFT, 5]}, preferred=0, drafted_by=8)  # one of them is right; another version drafts
    straw.step({"a": [1]}, preferred=0, drafted_by=8)  # of its, none
    straw.step({"a": [2]}, drafted_by=8)  # again; and now there is a copy
    straw.step({"a": [3, 4, 8]}, drafted_by=None, length=0)  # two of three copied ones are right; nobody proposes
    straw.step({"a": [1]}, drafted_by=8)
    verdicts = straw.counts()["verdicts"]
    even, odd = (verdicts[straw.copies._versions.index(version)] for version in (7, 8))
    assert even[3].tolist() == [0, 1, 0, 0] and odd[3].tolist() == [2, 0, 0, 0]
    assert verdicts[COPIED, 3].tolist() == [0, 0, 1, 0]
    assert verdicts.sum() == 4


def test_copies_are_tried_whether_or_not_they_are_verified() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4, 5, 6, 1])
    for token in (2, 3, 4, 5, 6, 1):
        straw.step({"a": [token]}, length=0, drafted_by=None)
    kind = 1 + ORDERS.index(3)
    counts = straw.counts()
    assert counts["simulated"][kind].tolist() == [0, 0, 0, 1]  # all three that were copied after 2, 3, 4
    straw.step({"a": [9]}, length=0, drafted_by=None)  # the next copy began with 2
    assert counts["simulated"].sum() == 2 and counts["simulated"][kind, 0] == 1
    assert counts["compared"].sum() == 0  # there was no rival


def test_copies_count_as_often_as_they_occur() -> None:
    """Not those more often that are soon over. Of "1 2 3 4" and something new, in turn, 3, 2, 1, 0 are right."""
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4, 50, 1, 2, 3, 4, 51])
    for cycle in range(9):
        for token in (1, 2, 3, 4, 52 + cycle):
            straw.step({"a": [token]}, length=0, drafted_by=None)
    right = straw.counts()["simulated"].sum(0).tolist()
    assert right == [3, 3, 3, 3]


def test_copy_and_draft_are_compared_by_their_first_token() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 4, 1])
    straw.step({"a": [2]}, preferred=0)
    straw.step({"a": [3]}, preferred=0)  # as the copy said
    straw.step({"a": [DRAFT]}, preferred=0)  # as the draft said
    straw.step({"a": [5]}, preferred=0)
    compared = straw.counts()["compared"]
    assert compared[1 + ORDERS.index(2)].tolist() == [[0, 0], [1, 0]]
    assert compared[1 + ORDERS.index(3)].tolist() == [[0, 1], [0, 0]]
    assert compared.sum() == 2 and straw.counts()["seen"].sum() == 4


def test_sampled_requests_are_kinds_of_their_own() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 1], temperature=0.7)
    straw.step({"a": [2]})
    assert straw.counts()["seen"].nonzero().flatten().tolist() == [1 + ORDERS.index(2) + 2 * len(ORDERS)]


def test_counts_are_fetched_every_few_steps_with_the_versions() -> None:
    straw = Straw()
    straw.arrive("a", [1, 2, 3, 1])
    fetched = []
    for i in range(2 * device_copies.FETCH_EVERY):
        straw.step({"a": [i % 3]}, drafted_by=5 + i // 20)
        fetched.append(straw.copies.fetch())
    found = [counts for counts in fetched if counts is not None]
    assert len(found) == 2 and sum(found[1][: straw.layout.compared]) == 2 * device_copies.FETCH_EVERY
    assert sorted(found[1][straw.layout.versions :]) == [5, 6]


def test_it_can_be_rehearsed_without_a_trace() -> None:
    straw = Straw()
    straw.copies.rehearse()
    assert not straw.copies._counts.any() and not straw.copies._own.any()


def test_longer_proposals_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        Straw(positions=MOST_TOKENS + 1)


@given(st.integers(0, 100_000))
def test_the_plan_knows_what_the_tables_take(answers: int) -> None:
    entries = answers_entries(answers)
    assert entries & (entries - 1) == 0 and entries >= 2 * answers * len(ORDERS)
    assert entries <= max(1, 4 * answers * len(ORDERS))
    if answers < 2000:
        copies = Straw(MOST_TOKENS, answers).copies
        tensors = [copies._own, copies._others, copies._requests]
        assert sum(t.nbytes for t in tensors) <= device_bytes(SLOTS, answers)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from aurora_vllm.control.copy_counts import COPIED, ORDERS, CountsLayout
from aurora_vllm.spec_decode import copy_kernels

layout = CountsLayout(8)
constants = {"ORDERS": (0, *ORDERS), "NUM_ORDERS": len(ORDERS), "OWN_MASK": 1023, "OTHERS_MASK": 0, "POSITIONS": 8,
             "COMPARED": layout.compared, "RIGHT": layout.simulated, "VERDICTS": layout.verdicts, "COPIED": COPIED}
types = {"tokens_ptr": "*i32", "slots_ptr": "*i64", "total_len_ptr": "*i32", "num_sampled_ptr": "*i32",
         "num_rejected_ptr": "*i32"}
for kernel in (copy_kernels.learn_kernel, copy_kernels.propose_kernel):
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(used, "constexpr")
    for capability in (80, 90, 100):
        target = GPUTarget("cuda", capability, 32)
        made = compile(ASTSource(kernel, signature, used), target=target, options={"num_warps": 1})
        print(kernel.__name__, capability, len(made.asm["cubin"]))
"""


def test_kernels_compile_for_gpus() -> None:
    """Ampere, Hopper and Blackwell, with the assembler that Triton brings along; no GPU is needed for that."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert len([line for line in found.stdout.splitlines() if int(line.split()[2]) > 1000]) == 6
