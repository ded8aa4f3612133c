"""Capture where vLLM drafts in another way than by default: sampled drafts, and steps that overlap."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_vllm.spec_decode.scheduler import AsyncAuroraScheduler
from benchmarks.engine import Engine
from tests.integration.reference import assert_states_agree, count_verdicts, sort_rows
from tests.integration.served import Served, answers, answers_to_what_vllm_refuses


@pytest.fixture(params=["v1", "v2"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(f"served_by_{request.param}_probabilistic")


def test_probabilistic_drafts_are_logged_right(served: Served) -> None:
    """Drafts drawn from the draft's distribution and verified against it; for a greedy request its best guesses."""
    assert served.engine.call("runner_class") == served.runner
    served.finish()
    before = served.engine.spec_decode_counters()
    prompts = [*served.short, served.text(120, 1)]
    served.generate(prompts, max_tokens=12, temperature=0.2)
    served.generate(prompts[:2], max_tokens=12)
    rows = served.finish()
    requests = list(sort_rows(rows, served.layout).values())
    assert len(requests) == len(prompts) + 2
    assert_states_agree(served.reference, requests, {})
    counted = served.assert_vllm_counted_the_same(rows, before)
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]


def uses_the_scheduler_for_overlapping_steps(engine: Engine) -> bool:
    return isinstance(engine.scheduler, AsyncAuroraScheduler)


def test_overlapping_steps_are_logged_right(served_by_v2_overlapping: Served) -> None:
    """vLLM's default on a GPU: a step is scheduled before the verdict of the one before it is known."""
    served = served_by_v2_overlapping
    assert served.engine.call("runner_class") == served.runner
    assert served.engine.run(uses_the_scheduler_for_overlapping_steps)
    served.finish()
    before = served.engine.spec_decode_counters()
    outputs = served.generate([*served.short, served.text(150, 1)], max_tokens=16)
    rows = served.finish()
    requests = list(sort_rows(rows, served.layout).values())
    assert len(requests) == len(outputs)
    for request, length, answer in answers(requests, outputs):
        assert request.tokens[length : length + len(answer) - 1] == answer[:-1]
        assert request.ended
    assert_states_agree(served.reference, requests, {})
    after, counted = served.engine.spec_decode_counters(), count_verdicts(rows, served.layout)
    # When a request turns out to have ended, one more step of it is under way. vLLM ignores that step's verdict.
    ignored = counted["drafts"] - (after["drafts"] - before.get("drafts", 0))
    assert 0 <= ignored <= len(outputs)
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]
    with served.engine.draft_length("never"):
        served.generate(served.short, max_tokens=8)
    requests = list(sort_rows(served.finish(), served.layout).values())
    assert_states_agree(served.reference, requests, {})
    assert served.engine.control.worker.capture_errors == 0


def counters(engine: Engine) -> dict[str, int]:
    return engine.spec_decode_counters()


def asked_logprobs(engine: Engine, prompts: list[list[int]], token_ids: list[int]) -> list[list[set[int]]]:
    """Of whom there are any, for each token of each answer."""
    done = engine.generate(prompts, max_tokens=12, logprob_token_ids=token_ids)
    return [[set(at) & set(token_ids) for at in one.outputs[0].logprobs or ()] for one in done]


def test_overlapping_steps_have_the_logprobs_that_were_asked_for(served_by_v2_overlapping: Served) -> None:
    engine, prompts = served_by_v2_overlapping.engine, served_by_v2_overlapping.short
    assert engine.run(asked_logprobs, prompts, [3, 5]) == [[{3, 5}] * 12] * len(prompts)


@pytest.mark.parametrize("sampling", [{"temperature": 1.5, "min_p": 1.0}, {"logit_bias": {5: 100.0}}])
def test_overlapping_steps_verify_drafts_with_what_vllm_refuses(
    served_by_v2_overlapping: Served, sampling: dict[str, Any]
) -> None:
    """There drafts do not pass through the scheduler, which takes them away elsewhere."""
    engine, prompts = served_by_v2_overlapping.engine, served_by_v2_overlapping.short
    greedy = engine.run(answers_to_what_vllm_refuses, prompts, {})
    before = engine.run(counters)["draft_tokens"]
    found = engine.run(answers_to_what_vllm_refuses, prompts, sampling)
    assert found == (greedy if "min_p" in sampling else [[5] * 12] * len(prompts))
    assert engine.run(counters)["draft_tokens"] > before + 50
