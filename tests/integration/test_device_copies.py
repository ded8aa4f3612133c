"""Copies in the worker of the real V2 engine: the same answers, in fewer steps, booked on who proposed, logged right.

The target is random and repeats itself, and the day-0 draft is random, too: what is accepted of copies is no measure of
anything, but that they are accepted shows that the right tokens stand in the right places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from aurora_vllm.control.decision import Decision
from aurora_vllm.spec_decode import device_copies
from aurora_vllm.spec_decode.copy_evidence import CopyEvidence
from aurora_vllm.spec_decode.device_copying import DeviceCopying
from benchmarks.engine import Engine
from tests.integration.reference import assert_states_agree, sort_rows
from tests.integration.served import Served


@pytest.fixture(scope="module", params=["v2", "v2_overlapping"])
def served(request: pytest.FixtureRequest) -> Served:
    """Requests that a test has left in the tables of the one before it do not matter: each begins with empty ones."""
    return request.getfixturevalue(f"served_by_{request.param}")


@pytest.fixture(scope="module")
def expected(served: Served) -> list[list[int]]:
    """What the target answers to ``repeating`` alone, in 40 tokens. Interpreted kernels take long over it."""
    return plain(served, repeating(served), max_tokens=40)


@contextmanager
def copying(served: Served) -> Iterator[None]:
    """For a while, as a server has it; other tests look at the draft."""
    served.engine.run(begin_copying)
    try:
        yield
    finally:
        served.engine.run(end_copying)


def begin_copying(engine: Engine) -> None:
    config = engine.session.config.model_copy(update={"prompt_lookup": True})
    session = engine.session.model_copy(update={"config": config})
    attachment, advisor = engine.attachment, engine.scheduler._advisor
    device_copies.FETCH_EVERY = 1
    copies = DeviceCopying.begin(session, engine.worker.model_runner, attachment.control, attachment.device)
    assert copies is not None
    attachment._copying = attachment._adapter.copying = copies
    advisor._evidence = CopyEvidence(advisor._control, 3, advisor._take_verdicts)
    advisor._controller.lengths = (1, 2, 3)


def end_copying(engine: Engine) -> None:
    attachment, advisor = engine.attachment, engine.scheduler._advisor
    attachment._copying = attachment._adapter.copying = advisor._evidence = advisor._controller.copies = None
    attachment.control.worker.copies_on_device = False
    advisor._controller.lengths = ()
    vars(advisor._controller).pop("decide", None)


def decide(engine: Engine, draft_length: int, proposed: int) -> None:
    """Whatever is measured."""
    engine.scheduler._advisor._controller.decide = lambda batch: Decision(
        draft_length, "test", "whole", False, proposed
    )


def forget_prompts(engine: Engine) -> bool:
    return bool(engine.llm.reset_prefix_cache())


def repeating(served: Served) -> list[list[int]]:
    """Prompts whose answers have something to copy."""
    return [served.text(30, 1) * 3, served.text(20, 2) * 4, *served.short[:2]]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def plain(served: Served, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    with served.engine.draft_length("never"):
        return tokens(served.generate(prompts, **sampling))


@pytest.mark.parametrize("drafted", [3, 0])
def test_answers_stay_the_target_s_and_rows_agree(served: Served, expected: list[list[int]], drafted: int) -> None:
    """Beside the draft's proposals and alone; and all of them are booked on who made them."""
    engine, prompts = served.engine, repeating(served)
    assert engine.call("runner_class") == served.runner
    served.finish()
    assert engine.run(forget_prompts)  # rows from the first position on
    booked = engine.control.scheduler
    with copying(served):
        engine.run(decide, drafted, 3)
        copied = booked.copied_drafts, booked.copied_accepted
        versions = sum(row.num_drafts for row in booked.acceptance())
        before = engine.spec_decode_counters()
        outputs = served.generate(prompts, max_tokens=40)
        rows = served.finish()
        after = engine.spec_decode_counters()
        assert booked.copying == "on" and engine.control.worker.copies_on_device
    assert tokens(outputs) == expected
    drafts, accepted = booked.copied_drafts - copied[0], booked.copied_accepted - copied[1]
    assert drafts > 20 and accepted > 20
    counted = after["drafts"] - before.get("drafts", 0)
    drafted_ones = sum(row.num_drafts for row in booked.acceptance()) - versions
    if drafted:  # each verdict is booked on a copy or a version; one of a step that vLLM ignored may be booked, too
        assert 0 <= drafts + drafted_ones - counted <= len(prompts) and drafted_ones > 0
    else:
        assert drafts <= counted and drafted_ones == 0
    requests = list(sort_rows(rows, served.layout).values())
    assert assert_states_agree(served.reference, requests, {}) > 100
    assert engine.control.worker.capture_errors == 0


def test_copies_alone_do_without_the_draft(served: Served) -> None:
    engine, prompt = served.engine, repeating(served)[0]
    with copying(served):
        engine.run(decide, 0, 3)
        served.generate([prompt], max_tokens=1)
        runs = engine.call("draft_runs")
        before = engine.spec_decode_counters()
        served.generate([prompt], max_tokens=30)
        after = engine.spec_decode_counters()
    assert engine.call("draft_runs") - runs == 1  # over the prompt
    assert after["accepted_tokens"] - before["accepted_tokens"] > 10


def test_an_answer_of_before_is_copied_unless_it_is_somebody_s_own(served_by_v2_overlapping: Served) -> None:
    """A request whose answer was given before, told apart by what the day-0 draft and its own text make of it."""
    served = served_by_v2_overlapping
    engine, prompt = served.engine, served.text(25, 3)
    expected = plain(served, [prompt], max_tokens=40)

    def accepted(**asked: Any) -> int:
        before = engine.spec_decode_counters()["accepted_tokens"]
        given = {"prompt_token_ids": prompt} | asked
        answer = engine.run(generate_salted, given)
        assert answer == expected[0]
        return int(engine.spec_decode_counters()["accepted_tokens"] - before)

    with copying(served):
        engine.run(decide, 0, 3)
        first = accepted(cache_salt="mine")
        again = accepted(cache_salt="mine")
        unsalted = accepted()
        copied = accepted()
        salted = accepted(cache_salt="other")
    assert first == again == unsalted == salted < copied


def generate_salted(engine: Engine, prompt: dict[str, Any]) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    return list(engine.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)


def break_copies(engine: Engine) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    engine.attachment._copying._copies.replace = fail  # type: ignore[union-attr, method-assign]


@pytest.mark.parametrize("drafted", [3, 0])
def test_a_fault_costs_copies_and_no_token(served: Served, expected: list[list[int]], drafted: int) -> None:
    engine, prompts = served.engine, repeating(served)
    with copying(served):
        engine.run(decide, drafted, 3)
        served.generate(prompts[:1], max_tokens=8)
        engine.run(break_copies)
        assert tokens(served.generate(prompts, max_tokens=30)) == [answer[:30] for answer in expected]
        assert not engine.control.worker.copies_on_device
        assert engine.control.scheduler.copying.startswith("failed in the worker")


def test_sampled_requests_take_copies_too(served_by_v2_overlapping: Served) -> None:
    """Nearly greedy ones: what is emitted is one of the most likely tokens, not always the most likely."""
    served = served_by_v2_overlapping
    engine, booked = served.engine, served.engine.control.scheduler
    with copying(served):
        engine.run(decide, 0, 3)
        before = booked.copied_accepted
        outputs = served.generate(repeating(served), max_tokens=24, temperature=0.01)
        assert [len(answer) for answer in tokens(outputs)] == [24] * 4
        assert booked.copied_accepted - before > 10
