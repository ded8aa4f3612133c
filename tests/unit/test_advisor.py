"""The scheduler's adviser: which steps it takes the cost of a draft length from."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from aurora_vllm.control.decision import Decision
from aurora_vllm.control.rollout import PROBATION_DRAFTS
from aurora_vllm.session import ENVIRONMENT_KEY
from aurora_vllm.spec_decode import steps_in_flight
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.consent import is_private
from aurora_vllm.spec_decode.rollback_watch import ACCOUNT_EVERY
from aurora_vllm.spec_decode.scheduler import AsyncAuroraScheduler, AuroraScheduler, advise
from tests.unit.tiny_world import World, session


@pytest.mark.parametrize(
    ("before", "after", "share", "counts"),
    [
        (False, False, 0.15, True),
        (True, True, 0.15, False),
        (True, False, 0.15, False),
        (False, True, 0.15, False),
        (True, True, 0.9, True),  # a learner that works most of the time is how things are
    ],
)
def test_a_step_beside_a_burst_of_the_learner_says_nothing_of_k(
    tmp_path: Path, before: bool, after: bool, share: float, counts: bool
) -> None:
    with session(World(), tmp_path, learner_cpu_share=share) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        advisor._control.learner.pid = advisor._control.server.learner_pid = 7
        step = SimpleNamespace(
            num_scheduled_tokens={"a": 1},
            scheduled_spec_decode_tokens={},
            num_spec_tokens_to_schedule=0,
            finished_req_ids=set(),
        )
        for _ in range(10):
            assert advisor.draft_length(1) == 0  # nothing is known yet
            advisor._control.learner.working = before
            advisor.step_starts()
            advisor._control.learner.working = after
            advisor.step_ends(step, [[1]])
        assert advisor._controller.costs.known(1) == counts
        assert advisor._control.scheduler.steps == 10


@pytest.mark.parametrize("running", [0, 8])
def test_a_learner_that_was_killed_in_a_burst_works_no_more(tmp_path: Path, running: int) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        control, steps = advisor._control, advisor._steps
        control.learner.pid, control.learner.working, control.server.learner_pid = 7, True, running
        for expected in (False, True):
            steps.begin()
            step = steps.end()
            assert step is not None and step.beside_learner == expected
            control.server.learner_pid = 7


def test_where_choosing_fails_the_status_does_not_show_what_was_chosen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        scheduler = advisor._control.scheduler
        assert advisor.draft_length(1) == scheduler.draft_length == 2
        with monkeypatch.context() as broken:
            broken.setattr(advisor._controller, "decide", lambda batch_size: 1 / 0)
            assert advisor.draft_length(1) == scheduler.draft_length == 0
        assert scheduler.reason == "choosing the draft length failed: ZeroDivisionError: division by zero"
        assert advisor.draft_length(1) == scheduler.draft_length == 2


def test_a_draft_that_sat_out_when_choosing_failed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        for decision, sits_out in ((Decision(0, "", sits_out=True), True), (None, True), (Decision(2, ""), False)):
            monkeypatch.setattr(advisor._controller, "decide", lambda batch_size, it=decision: it or 1 / 0)
            advisor.draft_length(1)
            assert advisor._control.scheduler.draft_sits_out is sits_out


def test_of_overlapping_steps_each_counts_from_where_the_one_before_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduled at 0 and 1 s, results at 10 and 13 s: the second took 3 s, not 12."""
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(steps_in_flight, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        seen: list[float] = []
        monkeypatch.setattr(advisor._controller.costs, "observe", lambda *step: seen.append(step[-1]))
        step = SimpleNamespace(
            num_scheduled_tokens={"a": 1},
            scheduled_spec_decode_tokens={},
            num_spec_tokens_to_schedule=0,
            finished_req_ids=set(),
        )
        for call in (advisor.step_starts, advisor.step_starts):
            call()
        assert advisor._control.scheduler.in_flight == 2
        for left in (1, 0):
            advisor.step_ends(step, [[1]])
            assert advisor._control.scheduler.in_flight == left
    assert seen == [10.0, 3.0]


def test_an_engine_whose_server_was_killed_meanwhile_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobodys = f"aurora-{2**30}-1-{'0' * 16}-control"  # above the largest pid there is
    with session(World(), tmp_path) as (shared, _):
        gone = shared.model_copy(update={"control": nobodys})
        monkeypatch.setenv(ENVIRONMENT_KEY, gone.model_dump_json())
        with pytest.raises(SystemExit):
            advise(SimpleNamespace(num_spec_tokens=3))


def go_live(advisor: SpeculationAdvisor, version: int, previous: int) -> None:
    """What the worker says, and that a step was scheduled and drafted with it since."""
    worker = advisor._control.worker
    worker.live_version, worker.previous_version = version, previous
    advisor.draft_length(1)
    advisor.drafts_arrived()


@pytest.mark.parametrize(("confidence", "condemned"), [(0.95, 3), (0.0, 0)])
def test_a_version_that_accepts_less_is_condemned_if_the_settings_say_so(
    tmp_path: Path, confidence: float, condemned: int
) -> None:
    """Version 2 accepts all it drafts, version 3 nothing."""
    with session(World(), tmp_path, speculate="always", rollback_confidence=confidence) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        scheduler, worker = advisor._control.scheduler, advisor._control.worker
        go_live(advisor, 2, 1)
        for _ in range(100):
            advisor.verified(2, 2, "a")
        assert scheduler.probation_version == 2 and scheduler.roll_back_version == 0
        worker.live_version, worker.previous_version = 3, 2
        for _ in range(7):
            advisor.verified(2, 2, "a")  # proposed before version 3 was live
        assert scheduler.probation_version == 2
        go_live(advisor, 3, 2)
        for drafts in range(1, 2 * ACCOUNT_EVERY):
            advisor.verified(2, 0, "a")
            if confidence:
                assert scheduler.probation_drafts == (
                    drafts // ACCOUNT_EVERY * ACCOUNT_EVERY or 1
                )  # not at every verdict
        assert advisor._controller.wants_verdicts == bool(condemned)  # it looks worse: K = 0 would leave it at that
        for _ in range(100):
            advisor.verified(2, 0, "a")
        assert scheduler.probation_version == 3 and scheduler.roll_back_version == condemned
        assert ("version 3 is worse than version 2" in scheduler.probation) == bool(condemned)
        assert [(row.version, row.num_drafts) for row in scheduler.acceptance()] == [(2, 107), (3, 139)]


def test_a_probation_that_ends_well_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.aurora")
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        for version in (2, 3):  # nothing is known that version 2 could be compared with
            go_live(advisor, version, version - 1)
            for _ in range(PROBATION_DRAFTS + 100):
                advisor.verified(2, 2, "a")
        (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("aurora: version 3 stays, not found worse than version 2: ")


def test_verdicts_on_copies_put_no_version_on_probation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        go_live(advisor, 2, 1)
        monkeypatch.setattr(advisor._proposals, "copied", lambda name: name == "copies")
        advisor.verified(2, 0, "copies")
        assert advisor._control.scheduler.probation_version == 0
        advisor.verified(2, 0, "drafts")
        assert advisor._control.scheduler.probation_version == 2


def test_what_is_known_of_a_version_fades_with_the_next_and_comes_back_with_it(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        trials = lambda: advisor._controller.acceptance._live.trials[0]  # noqa: E731
        go_live(advisor, 2, 1)
        for _ in range(40):
            advisor.verified(2, 2, "a")
        known = trials()
        go_live(advisor, 2, 1)
        assert trials() == known > 38
        go_live(advisor, 3, 2)
        assert trials() == pytest.approx(known * 0.25)
        for _ in range(40):
            advisor.verified(2, 0, "a")
        go_live(advisor, 2, 3)  # rolled back
        assert trials() == known


def test_the_learners_simulation_counts_for_the_version_it_is_of(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        learner, known = advisor._control.learner, advisor._controller.acceptance
        learner.shadow_accepted_per_position = [0.5, 0.25]
        for version, steps in ((3, 40), (2, 0)):  # of another version, and of none yet
            learner.shadow_version, learner.shadow_steps = version, steps
            go_live(advisor, 2, 1)
            assert known.chain() == [0.0, 0.0]
        learner.shadow_steps = 40
        go_live(advisor, 2, 1)
        assert known.chain() == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("trusted", ["draft", "resume", ""])
def test_a_draft_that_somebody_gave_is_trusted_until_it_is_measured(tmp_path: Path, trusted: str) -> None:
    with session(World(), tmp_path) as (current, _):
        if trusted == "resume":
            current = current.model_copy(update={"resume": tmp_path})
        elif trusted:
            current = current.model_copy(update={"config": current.config.model_copy(update={"draft": tmp_path})})
        expected = SpeculationAdvisor(current, 2)._controller.acceptance.expected_length(2)
        assert expected == pytest.approx(1 + 0.6 + 0.36 if trusted else 1.0)


def test_no_more_is_drafted_or_copied_than_vllm_verifies(tmp_path: Path) -> None:
    with session(World(), tmp_path, speculate="always", num_speculative_tokens=3) as (current, _):
        for verified, drafted in ((1, 1), (8, 3)):
            advisor = SpeculationAdvisor(current, verified)
            assert advisor.draft_length(1) == drafted
            assert advisor._proposals._copier is not None and advisor._proposals._copier._positions == verified


def test_the_worker_is_told_whether_the_draft_may_sit_prompts_out(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        told = advisor._control.scheduler
        for wanted in (False, True, False):
            advisor._controller.wants_verdicts = wanted
            for _ in range(2):
                advisor.draft_length(1)
                assert told.draft_sits_out != wanted  # a draft that nobody has tried yet


def test_steps_and_tokens_are_counted(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        for scheduled, drafts, sampled in (
            ({"a": 3, "b": 1}, {"a": [7, 8]}, [[7, 9], [4]]),
            ({"a": 1, "b": 1}, {}, [[7], [4]]),
            ({"a": 200}, {}, [[]]),  # inside a prompt
            ({}, {}, []),  # nothing to do
        ):
            advisor.step_starts()
            step = SimpleNamespace(
                num_scheduled_tokens=scheduled,
                scheduled_spec_decode_tokens=drafts,
                num_spec_tokens_to_schedule=0,
                finished_req_ids=set(),
            )
            advisor.step_ends(step, sampled)
        counted = advisor._control.scheduler
        assert (counted.steps, counted.spec_steps, counted.generated_tokens) == (3, 1, 5)


def test_without_a_session_or_drafts_nobody_advises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_KEY, raising=False)
    assert advise(SimpleNamespace(num_spec_tokens=3)) is None
    with session(World(), tmp_path) as (current, _):
        monkeypatch.setenv(ENVIRONMENT_KEY, current.model_dump_json())
        assert advise(SimpleNamespace(num_spec_tokens=0)) is None


@pytest.mark.parametrize(
    ("why", "overlap", "runner_v2", "sample"),
    [
        ("on", False, False, "greedy"),
        ("off: steps overlap", True, False, "greedy"),
        ("off: the worker", False, True, "greedy"),
        ("off: the worker", True, True, "greedy"),
        ("off: drafts are sampled", False, False, "probabilistic"),
    ],
)
def test_drafts_are_replaced_only_where_vllm_lets_them_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, overlap: bool, runner_v2: bool, sample: str
) -> None:
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=overlap),
        use_v2_model_runner=runner_v2,
        speculative_config=SimpleNamespace(draft_sample_method=sample, num_speculative_tokens=2),
    )
    with session(World(), tmp_path, speculate="always") as (current, _):
        monkeypatch.setenv(ENVIRONMENT_KEY, current.model_dump_json())
        scheduler = SimpleNamespace(num_spec_tokens=2, vllm_config=vllm_config, max_num_scheduled_tokens=64)
        advisor = advise(scheduler)
        assert advisor is not None and advisor._control.scheduler.copying.startswith(why)
        assert scheduler.dynamic_sd_lookup[1] == 2  # where vLLM looks K up
        assert advisor._proposals._budget == 64
        assert advisor._overlapping is overlap
        assert advisor._withdrawal._one_by_one is (overlap and not runner_v2)


@pytest.mark.parametrize("kind", [AuroraScheduler, AsyncAuroraScheduler])
def test_the_scheduler_tells_its_adviser_in_time(monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
    """Before vLLM takes a request or drafts, before it schedules a step, and after it has seen what came of it."""
    told: list[tuple[Any, ...]] = []

    def noting(name: str) -> Any:
        return lambda *args: told.append((name, *args))

    for base in AsyncAuroraScheduler.__mro__:
        if base.__module__.startswith("vllm."):
            for name in ("schedule", "update_from_output", "update_draft_token_ids", "make_spec_decoding_stats"):
                if name in vars(base):
                    monkeypatch.setattr(base, name, lambda self, *args, _name=name, **kwargs: told.append((_name,)))
    monkeypatch.setattr(Scheduler, "add_request", lambda self, request: told.append(("add_request",)))
    scheduler = object.__new__(kind)
    names = ("request_arrives", "step_starts", "step_ends", "drafts_arrived", "verified")
    scheduler._advisor = SimpleNamespace(**{name: noting(name) for name in names})
    requests = scheduler.requests = {"a": "the one before"}
    new, more = SimpleNamespace(request_id="b"), SimpleNamespace(request_id="a")
    scheduler.add_request(new)
    scheduler.add_request(more)  # input that goes on
    arrived = [("request_arrives", new, None), ("request_arrives", more, "the one before")]
    assert told == [arrived[0], ("add_request",), arrived[1], ("add_request",)]
    told.clear()
    scheduler.schedule()
    assert told == [("step_starts", requests), ("schedule",)]
    told.clear()
    scheduler.update_draft_token_ids("drafts")
    assert told == [("drafts_arrived", "drafts", requests), ("update_draft_token_ids",)]
    told.clear()
    scheduler.make_spec_decoding_stats(None, num_draft_tokens=2, num_accepted_tokens=1, request_id="r")
    scheduler.make_spec_decoding_stats(None, num_draft_tokens=0, num_accepted_tokens=0, request_id="r")
    assert told == [("verified", 2, 1, "r"), *[("make_spec_decoding_stats",)] * 2]
    told.clear()
    scheduler.update_from_output("step", SimpleNamespace(sampled_token_ids=[[7]]))
    assert told == [("update_from_output",), ("step_ends", "step", [[7]])]
    scheduler._advisor = None  # no session, or no drafts
    told.clear()
    scheduler.add_request(new)
    scheduler.schedule()
    scheduler.update_draft_token_ids("drafts")
    scheduler.make_spec_decoding_stats(None, num_draft_tokens=2)
    scheduler.update_from_output("step", None)
    assert [name for name, *_ in told] == [
        "add_request", "schedule", "update_draft_token_ids", "make_spec_decoding_stats", "update_from_output"
    ]  # fmt: skip


@pytest.mark.parametrize("overlapping", [False, True])
def test_where_steps_overlap_the_next_verdicts_are_on_the_version_that_is_live_now(
    tmp_path: Path, overlapping: bool
) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2, overlapping=overlapping)
        advisor._control.worker.live_version = 3
        advisor.step_ends(SimpleNamespace(finished_req_ids=set()), [])
        advisor.verified(2, 1, "r")
        assert [row.version for row in advisor._control.scheduler.acceptance()] == [3 if overlapping else 0]


def test_a_request_that_goes_on_keeps_its_salt_and_drafts_are_withdrawn_before_a_step(tmp_path: Path) -> None:
    def request(name: str, salt: str | None, **asked: Any) -> SimpleNamespace:
        params = SimpleNamespace(extra_args=None, **asked)
        return SimpleNamespace(request_id=name, cache_salt=salt, sampling_params=params, spec_token_ids=[1])

    with session(World(), tmp_path) as (current, _):
        advisor = SpeculationAdvisor(current, 2)
        salted, more, open_to_all = request("a", "mine"), request("a", None), request("b", None)
        asking = request("c", None, logprob_token_ids=[5])
        advisor.request_arrives(salted)
        advisor.request_arrives(more, salted)
        advisor.request_arrives(open_to_all)
        assert [is_private(one.sampling_params) for one in (salted, more, open_to_all)] == [True, True, False]
        advisor.step_starts({"b": open_to_all})
        assert open_to_all.spec_token_ids == [1]
        advisor.request_arrives(asking)
        advisor.step_starts({"b": open_to_all, "c": asking})
        assert open_to_all.spec_token_ids == []
