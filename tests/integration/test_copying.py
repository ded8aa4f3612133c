"""Drafts copied from the request, in the real V1 engine: the same answers, in fewer steps, and logged right."""

from __future__ import annotations

import pytest

from aurora_vllm.spec_decode.scheduler import _copying
from tests.integration.reference import assert_states_agree, sort_rows
from tests.integration.served import Served


def repeating(served: Served) -> list[list[int]]:
    """Prompts whose answers have something to copy, and two that have not."""
    return [served.text(60, 1) * 2, served.text(40, 2) * 3, *served.short[:2]]


@pytest.fixture(scope="module")
def plain(served_by_v1: Served) -> list[list[int]]:
    """What the target answers alone."""
    with served_by_v1.engine.draft_length("never"):
        outputs = served_by_v1.generate(repeating(served_by_v1), max_tokens=48)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 1}])
def test_answers_stay_the_target_s_and_rows_agree(
    served_by_v1: Served, plain: list[list[int]], sampling: dict[str, float]
) -> None:
    served, prompts = served_by_v1, repeating(served_by_v1)
    engine, booked = served.engine, served.engine.control.scheduler
    served.finish()
    assert engine.llm.reset_prefix_cache()  # rows from the first position on
    counters = engine.spec_decode_counters()
    versions = sum(row.num_drafts for row in booked.acceptance())
    before = booked.copied_drafts, booked.copied_accepted
    with engine.copying() as copier, engine.draft_length("always"):
        outputs = served.generate(prompts, max_tokens=48, **sampling)
        rows = served.finish()
        assert len(copier._requests) <= 1  # those that ended are forgotten with the next step
    assert [list(o.outputs[0].token_ids) for o in outputs] == plain
    drafts, accepted = booked.copied_drafts - before[0], booked.copied_accepted - before[1]
    assert drafts > 20 and accepted > 60  # of these answers' tokens; of the day-0 draft's next to none are
    counted = served.assert_vllm_counted_the_same(rows, counters)
    # What is not booked as copied is booked on a version, and together they are what vLLM counted.
    assert drafts + sum(row.num_drafts for row in booked.acceptance()) - versions == counted["drafts"]
    requests = list(sort_rows(rows, served.layout).values())
    assert assert_states_agree(served.reference, requests, {}) > 200


def test_where_the_scheduler_gets_no_drafts_to_replace_it_says_so(served_by_v1: Served) -> None:
    config = served_by_v1.engine.llm.llm_engine.vllm_config
    assert _copying(config) == ("", ())
    config.speculative_config.draft_sample_method = "probabilistic"
    try:
        assert "probabilities" in _copying(config)[0]
    finally:
        config.speculative_config.draft_sample_method = "greedy"
