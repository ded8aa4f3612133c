"""What the hook logs, against transformers on the same tokens and against vLLM's own counters, on both runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm.checkpoint import Draft
from aurora_vllm.spec_decode.trace import StepTrace, TraceWriter
from aurora_vllm.transport.rows import Field, RowFlag
from benchmarks.engine import Engine
from tests.integration.reference import assert_states_agree, sort_rows
from tests.integration.served import Served, answers, answers_to_what_vllm_refuses


@pytest.fixture(scope="module", params=["v1", "v2"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(f"served_by_{request.param}")


@pytest.fixture(autouse=True)
def _empty_ring(served: Served) -> Iterator[None]:
    served.finish()
    yield


def test_the_runner_is_the_one_meant(served: Served) -> None:
    """vLLM falls back to V1 with a line in its log; then everything below would pass for the wrong runner."""
    assert served.engine.call("runner_class") == served.runner
    assert served.engine.control.worker.attached
    assert served.engine.control.worker.capture_on


def test_what_a_learner_would_be_lent_of_the_target_is_its_checkpoints(served: Served) -> None:
    assert served.engine.call("lent_ends_are_the_checkpoints") == [True, True]


def test_the_plan_knows_what_a_token_takes_of_the_kv_cache(served: Served) -> None:
    layers, of_target = served.engine.call("kv_bytes_per_token")
    session, specs = served.engine.session, tuple(served.engine.bank.specs)
    draft = Draft(session.draft, "given", (), 0, specs)
    assert sum(layers.values()) == of_target + draft.kv_width * session.row_layout.dtype.itemsize
    assert 0 < of_target < sum(layers.values())


def test_mixed_batch_with_chunked_prefill_agrees_with_transformers(served: Served) -> None:
    prompts = [*served.short, served.text(150, 1), served.text(120, 2)]  # 96 tokens fit into one step
    before = served.engine.spec_decode_counters()
    outputs = served.generate(prompts, max_tokens=24)
    rows = served.finish()
    requests = list(sort_rows(rows, served.layout).values())
    assert len(requests) == len(prompts)
    for request, length, answer in answers(requests, outputs):
        # The last token has no row of its own: nothing was computed after it. Drafts beyond max_tokens may.
        assert request.tokens[length : length + len(answer) - 1] == answer[:-1]
        assert request.emitted[length - 1] == answer[0]
        assert request.ended
    compared = assert_states_agree(served.reference, requests, {})
    assert compared > 400
    assert sum(len(request.branches) for request in requests) > 20
    counted = served.assert_vllm_counted_the_same(rows, before)
    assert 0 < counted["accepted_tokens"] < counted["draft_tokens"]


def test_prefix_cache_hit_starts_the_path_behind_the_cached_tokens(served: Served) -> None:
    prompt = served.text(140, 3)
    served.generate([prompt], max_tokens=4)
    served.finish()
    served.generate([prompt], max_tokens=12)
    (request,) = sort_rows(served.finish(), served.layout).values()
    assert min(request.path) > 0
    assert assert_states_agree(served.reference, [request], {0: prompt}) > 12


def preemptions(engine: Engine) -> int:
    return next(int(metric.value) for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")


def test_preempted_requests_are_logged_right(served: Served) -> None:
    """Eight long requests do not fit into the KV cache together."""
    before = served.engine.run(preemptions)
    counters = served.engine.spec_decode_counters()
    prompts = [served.text(60, 6 + i) for i in range(8)]
    served.generate(prompts, max_tokens=served.until_preempted)
    rows = served.finish()
    assert served.engine.run(preemptions) > before, "the KV cache of this engine is too large for the test"
    requests = list(sort_rows(rows, served.layout).values())
    assert len(requests) == 8
    assert_states_agree(served.reference, requests[:3], {})
    served.assert_vllm_counted_the_same(rows, counters)


def test_finish_at_prefill_and_length_limit(served: Served) -> None:
    counters = served.engine.spec_decode_counters()
    for length, tokens in (255, 1), (240, 16):  # max_model_len is 256
        (output,) = served.generate([served.text(length, length % 7)], max_tokens=20)
        assert len(output.outputs[0].token_ids) == tokens
    rows = served.finish()
    requests = list(sort_rows(rows, served.layout).values())
    assert len(requests[0].path) == 255
    assert all(request.ended for request in requests)
    assert_states_agree(served.reference, requests, {})
    served.assert_vllm_counted_the_same(rows, counters)


def begin_and_abort(engine: Engine, prompt: list[int]) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=100, detokenize=False)
    core.add_request("to-abort", {"prompt_token_ids": prompt}, sampling)
    for _ in range(4):
        core.step()
    core.abort_request(["to-abort"])


def test_aborted_request_ends(served: Served) -> None:
    prompt = served.text(20, 4)
    served.engine.run(begin_and_abort, prompt)
    (request,) = sort_rows(served.finish(), served.layout).values()
    assert request.ended
    assert request.tokens[:20] == prompt
    assert assert_states_agree(served.reference, [request], {}) >= 20


def test_opted_out_requests_leave_nothing(served: Served) -> None:
    seen = served.engine.control.worker.requests_opted_out
    served.generate(served.short, max_tokens=4, extra_args={"aurora_learn": False})
    rows = served.finish()
    assert len(rows) == 0
    assert served.engine.control.worker.requests_opted_out == seen + len(served.short) + 1


def test_sampled_and_greedy_requests_are_told_apart(served: Served) -> None:
    before = served.engine.spec_decode_counters()
    served.generate(served.short, temperature=0.7, seed=3, max_tokens=8)
    served.generate(served.short[:1], max_tokens=8)
    rows = served.finish()
    *sampled, greedy = sort_rows(rows, served.layout).values()
    assert [request.temperature_milli for request in (*sampled, greedy)] == [700] * 4 + [0]
    assert_states_agree(served.reference, [*sampled, greedy], {})
    served.assert_vllm_counted_the_same(rows, before)


def test_min_p_and_logit_bias_hold_while_others_speculate(served: Served) -> None:
    def ask(**sampling: Any) -> list[list[int]]:
        found: list[list[int]] = served.engine.run(answers_to_what_vllm_refuses, served.short, sampling)
        return found

    assert ask(temperature=1.5, min_p=1.0) == ask()  # whatever is less probable than the best is out
    assert ask(logit_bias={5: 100.0}) == [[5] * 12] * len(served.short)


def test_rows_carry_the_version_that_proposed(served: Served) -> None:
    served.generate(served.short[:1], max_tokens=8)
    meta = served.layout.meta(served.finish())
    drafted = meta[meta[:, Field.NUM_DRAFTS] > 0]
    assert set(drafted[:, Field.DRAFT_VERSION].tolist()) == {served.engine.control.worker.live_version}


def fail_to_write(engine: Engine, times: int) -> None:
    writer = engine.attachment.writer
    planted = iter(range(times))

    def write(trace: StepTrace) -> int:
        if next(planted, None) is not None:
            raise RuntimeError("planted")
        return TraceWriter.write(writer, trace)

    writer.write = write  # type: ignore[method-assign]


def test_a_failing_hook_costs_rows_and_no_request(served: Served) -> None:
    expected = served.generate(served.short[:1], max_tokens=8)[0].outputs[0].token_ids
    errors = served.engine.control.worker.capture_errors
    served.engine.run(fail_to_write, 2)
    assert served.generate(served.short[:1], max_tokens=8)[0].outputs[0].token_ids == expected
    assert served.engine.control.worker.capture_errors == errors + 2
    assert served.engine.control.worker.capture_on


def test_without_speculation_every_token_is_still_logged(served: Served) -> None:
    before = served.engine.call("draft_runs")
    served.generate(served.short[:1], max_tokens=4)
    served.finish()
    counters, runs = served.engine.spec_decode_counters(), served.engine.call("draft_runs")
    assert runs > before
    with served.engine.draft_length("never"):
        served.generate(served.short, max_tokens=16)
        assert served.engine.call("draft_runs") == runs  # not even over the prompts
    rows = served.finish()
    requests = list(sort_rows(rows, served.layout).values())
    assert_states_agree(served.reference, requests, {})
    assert not (served.layout.meta(rows)[:, Field.FLAGS] & RowFlag.REJECTED).any()
    # The first step after the switch may still verify what was drafted before it.
    assert served.engine.spec_decode_counters()["drafts"] - counters["drafts"] <= len(served.short)


def published(engine: Engine) -> int:
    """Other weights of the same size, ready to go live at the next step. Their version."""
    tensors = load_file(engine.session.draft / "model.safetensors")
    noise = torch.Generator().manual_seed(4)
    for spec in engine.bank.specs:
        if tensors[spec.name].is_floating_point():
            tensors[spec.name] += 0.3 * tensors[spec.name].std() * torch.randn(spec.shape, generator=noise)
    version = max(engine.bank.published(), 1) + 1
    engine.bank.publish(version, {spec.name: tensors[spec.name] for spec in engine.bank.specs}, {"why": "test"})
    engine.wait_for(lambda: engine.control.worker.staged_version == version)
    return version


def answers_with_a_swap_on_the_way(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Greedy answers of 16 tokens, and the version that went live when each had a few of them."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    for index, prompt in enumerate(prompts):
        core.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    for _ in range(3):
        core.step()
    version, answers = published(engine), {}
    while core.has_unfinished_requests():
        answers |= {done.request_id: list(done.outputs[0].token_ids) for done in core.step() if done.finished}
    return [answers[str(index)] for index in range(len(prompts))], version


def roll_back(engine: Engine) -> bool:
    stager = engine.attachment.stager
    return stager is not None and stager.roll_back()


def test_a_swap_changes_the_draft_and_no_answer(served: Served) -> None:
    hidden = torch.randn(2, served.engine.session.hidden_size, generator=torch.Generator().manual_seed(3)).tolist()
    drafts_before, target_before = (served.engine.call(f"{which}_logits", hidden) for which in ("draft", "target"))
    version_before = served.engine.control.worker.live_version
    expected = [list(o.outputs[0].token_ids) for o in served.generate(served.short, max_tokens=16)]
    served.finish()
    answers, version = served.engine.run(answers_with_a_swap_on_the_way, served.short)
    assert answers == expected
    meta = served.layout.meta(served.finish())
    drafted = meta[meta[:, Field.NUM_DRAFTS] > 0]
    assert set(drafted[:, Field.DRAFT_VERSION].tolist()) == {version_before, version}
    # Of the three steps before the swap two verified drafts; what the third proposed was verified after it.
    assert len(drafted[drafted[:, Field.DRAFT_VERSION] == version_before, Field.STEP].unique()) == 3
    assert served.engine.call("draft_logits", hidden) != drafts_before
    assert served.engine.call("target_logits", hidden) == target_before
    assert served.engine.run(roll_back)
    assert served.engine.control.worker.live_version == version_before
    assert served.engine.call("draft_logits", hidden) == drafts_before
