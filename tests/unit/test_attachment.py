"""What the worker carries for the learner: what is on, and what is left of it where something fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_vllm.server.status import NOT_ATTACHED, status
from aurora_vllm.session import ENVIRONMENT_KEY, Session
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.spec_decode.trace import StepTrace
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment
from tests.unit.test_runner_v2 import StrawRunner
from tests.unit.tiny_world import World, session


@pytest.mark.parametrize("learn", [True, False])
def test_nothing_is_captured_where_nobody_learns(tmp_path: Path, learn: bool) -> None:
    with session(World(), tmp_path, learn=learn) as (shared, _):
        attachment = Attachment(shared, StrawRunner(), V2Adapter)
        attachment.start_serving()
        assert attachment.serving and attachment.control.worker.capture_on == learn
        said = "" if learn else "off: there is no learner, by the settings"
        assert attachment.control.worker.message == said and attachment.control.worker.model_runner == "V2"
        asked: list[int] = []

        def build() -> StepTrace:
            asked.append(1)
            raise RuntimeError("no step")

        attachment._on_step(build)
        assert len(asked) == attachment.control.worker.capture_errors == learn
        attachment.close()


def test_a_hook_that_never_captures_is_switched_off_though_requests_are_followed(tmp_path: Path) -> None:
    with session(World(), tmp_path) as (shared, _):
        attachment = Attachment(shared, StrawRunner(), V2Adapter)
        attachment.start_serving()
        step: Any = SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=[], total_num_scheduled_tokens=1)
        for turn in range(4):
            attachment.step_starts(step)
            assert attachment.control.worker.capture_on == (turn < 3)
            attachment._on_step(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
        assert attachment.control.worker.capture_errors == 3
        attachment.close()


def test_a_worker_that_is_bound_to_fewer_cpus_than_the_server_reads_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU vLLM binds its workers (OMP_PLACES), and the server checked the settings."""
    with session(World(), tmp_path, learner_threads=2) as (shared, _):
        monkeypatch.setenv(ENVIRONMENT_KEY, shared.model_dump_json())
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
        assert Session.from_environment() == shared


def test_it_is_said_where_no_request_is_chosen(tmp_path: Path) -> None:
    with session(World(), tmp_path, sample_rate=0.0) as (shared, _):
        attachment = Attachment(shared, StrawRunner(), V2Adapter)
        attachment.start_serving()
        worker = attachment.control.worker
        assert worker.capture_on and worker.message == "no request is captured: sample_rate is 0"
        attachment.close()


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_that_cannot_attach_says_why_and_serves_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    with session(World(), tmp_path) as (shared, _):
        found = shared.model_copy(update={"control": "aurora-1-1-0123456789abcdef-control"}) if lost else shared
        monkeypatch.setenv(ENVIRONMENT_KEY, found.model_dump_json())
        runner = StrawRunner()
        monkeypatch.setattr(V2Adapter, "__init__", lambda *_, **__: 1 / 0)
        assert Attachment.to_worker(SimpleNamespace(model_runner=runner)) is None
        told = ControlBlock.attach(Segment.attach(shared.control))
        assert told.worker.message == ("" if lost else "could not attach: ZeroDivisionError: division by zero")
        capture = status(told.snapshot(), {"used": 0, "capacity": 0}, {}, {"learn": True}, 0)["capture"]
        assert not capture["on"] and capture["message"] == (NOT_ATTACHED if lost else told.worker.message)


def test_a_worker_that_cannot_start_serves_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with session(World(), tmp_path) as (shared, _):
        attachment = Attachment(shared, StrawRunner(), V2Adapter)
        monkeypatch.setattr("aurora_vllm.spec_decode.attachment.place", lambda *args, **kwargs: 1 / 0)
        attachment.start_serving()
        assert not attachment.serving and not attachment.control.worker.attached
        attachment.step_starts(None)  # type: ignore[arg-type]
        attachment.close()
