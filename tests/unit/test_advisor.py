"""The scheduler's adviser: which steps it takes the cost of a draft length from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from aurora_vllm.control.profit import Decision
from aurora_vllm.session import ENVIRONMENT_KEY
from aurora_vllm.spec_decode import advisor as advisor_module
from aurora_vllm.spec_decode.advisor import DraftLengthAdvisor
from aurora_vllm.spec_decode.scheduler import advise
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
        advisor = DraftLengthAdvisor(current, 2)
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
        control = DraftLengthAdvisor(current, 2)._control
        control.learner.pid, control.learner.working, control.server.learner_pid = 7, True, running
        assert not DraftLengthAdvisor(current, 2)._learner_works()
        control.server.learner_pid = 7
        assert DraftLengthAdvisor(current, 2)._learner_works()


def test_where_choosing_fails_the_status_does_not_show_what_was_chosen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with session(World(), tmp_path, speculate="always") as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        scheduler = advisor._control.scheduler
        assert advisor.draft_length(1) == scheduler.draft_length == 2
        with monkeypatch.context() as broken:
            broken.setattr(advisor._controller, "decide", lambda batch_size: 1 / 0)
            assert advisor.draft_length(1) == scheduler.draft_length == 0
        assert scheduler.reason == "choosing the draft length failed: ZeroDivisionError: division by zero"
        assert advisor.draft_length(1) == scheduler.draft_length == 2


def test_a_draft_that_sat_out_when_choosing_failed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
        for decision, sits_out in ((Decision(0, "", sits_out=True), True), (None, True), (Decision(2, ""), False)):
            monkeypatch.setattr(advisor._controller, "decide", lambda batch_size, it=decision: it or 1 / 0)
            advisor.draft_length(1)
            assert advisor._control.scheduler.draft_sits_out is sits_out


def test_of_overlapping_steps_each_counts_from_where_the_one_before_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduled at 0 and 1 s, results at 10 and 13 s: the second took 3 s, not 12."""
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(advisor_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with session(World(), tmp_path) as (current, _):
        advisor = DraftLengthAdvisor(current, 2)
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
