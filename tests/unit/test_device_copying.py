"""Copies on the device, tied to a session: from a runner's call to the scheduler's decision and back."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from aurora_vllm.control.copy_counts import NUM_KINDS, CountsLayout
from aurora_vllm.control.decision import Decision
from aurora_vllm.session import Session
from aurora_vllm.spec_decode import device_copies
from aurora_vllm.spec_decode.advisor import SpeculationAdvisor
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.device_copying import DeviceCopying
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.request_states import request_states
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.segment import Segment
from tests.unit.tiny_world import World, session

POSITIONS = 3
CPU = torch.device("cpu")


class Straw:
    """A V2 runner with one request, whose draft proposes nines."""

    def __init__(self) -> None:
        self.tokens, self.total = torch.zeros(2, 64, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        self.req_states = request_states(self.tokens, self.total, np.zeros(2, dtype=np.int32), 100)
        self.speculator: Any = SimpleNamespace(
            draft_logits=None, num_speculative_steps=POSITIONS, propose=self._propose,
            draft_tokens=torch.zeros(2, POSITIONS, dtype=torch.int64),
        )  # fmt: skip
        self.drafted: list[int] = []
        self.computed = 0

    def sample(self, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        return SimpleNamespace(sampled_token_ids=torch.zeros(1, 4), num_sampled=torch.ones(1)), None, None

    def get_model(self) -> None:
        raise SwapRefused("straw")

    get_draft_model = get_model

    def _propose(
        self, input_batch: Any, *, num_sampled: Any, num_rejected: Any, num_speculative_tokens: int
    ) -> torch.Tensor:
        self.drafted.append(num_speculative_tokens)
        filled = self.speculator.draft_tokens[:1].fill_(9)
        return filled if num_speculative_tokens else filled.fill_(-1)

    def step(self, text: list[int], length: int = POSITIONS, verified: int = 0) -> list[int]:
        """The request's text is this now; what is proposed next."""
        before = self.computed
        self.tokens[0, : len(text)], self.total[0], self.computed = torch.tensor(text), len(text), len(text) - 1
        new = len(text) - before - 1
        batch = SimpleNamespace(
            num_reqs=1, req_ids=["a"], has_prefill=not before, idx_mapping=torch.tensor([0]),
            idx_mapping_np=np.array([0]), num_computed_tokens_np=np.array([before]),
            num_scheduled_tokens=np.array([new]), prefill_len_np=np.array([len(text) - 1 if not before else 1]),
        )  # fmt: skip
        sampled = 1 if not before else new
        counts = {
            "num_sampled": torch.tensor([sampled]),
            "num_rejected": torch.tensor([max(verified + 1 - sampled, 0)]),
        }
        self.sample(None, batch, None)
        proposed = self.speculator.propose(batch, **counts, num_speculative_tokens=length)
        return list(proposed[0].tolist())


@pytest.fixture
def current(tmp_path: Path) -> Iterator[Session]:
    with session(World(), tmp_path, speculate="auto", num_speculative_tokens=POSITIONS) as (made, _):
        yield made


def control_of(current: Session) -> ControlBlock:
    return ControlBlock.attach(Segment.attach(current.control))


def hooked(current: Session, sits_out: bool = False) -> tuple[Straw, DeviceCopying, ControlBlock]:
    """A runner with the adapter and the copies on it, and a request."""
    runner, control = Straw(), control_of(current)
    adapter = V2Adapter(runner, lambda build: None, on_propose=lambda: 4, sits_out=lambda: sits_out)
    copying = DeviceCopying.begin(current, runner, control, CPU)
    assert copying is not None and control.worker.copies_on_device
    adapter.copying = copying
    come(copying)
    return runner, copying, control


def come(copying: DeviceCopying) -> None:
    params = SimpleNamespace(extra_args=None, temperature=0.0)
    new = SimpleNamespace(req_id="a", sampling_params=params)
    pooling = SimpleNamespace(req_id="b", sampling_params=None)
    copying.requests_change(SimpleNamespace(finished_req_ids=["z"], scheduled_new_reqs=[new, pooling]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "logits"),
    [({"prompt_lookup": False}, None), ({"speculate": "never"}, None), ({}, torch.zeros(1))],
)
def test_where_nothing_is_to_be_copied_or_can_be(current: Session, settings: dict[str, Any], logits: Any) -> None:
    runner = Straw()
    runner.speculator.draft_logits = logits
    changed = current.model_copy(update={"config": current.config.model_copy(update=settings)})
    assert DeviceCopying.begin(changed, runner, control_of(current), CPU) is None
    assert not control_of(current).worker.copies_on_device


def test_a_device_that_cannot_is_served_without(
    current: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    runner = Straw()
    del runner.req_states.all_token_ids
    assert DeviceCopying.begin(current, runner, control_of(current), CPU) is None
    assert "drafts cannot be copied on this device; serving goes on without" in caplog.text


TEXT = [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("drafting", "length", "sits_out", "drafted", "proposed"),
    [
        (3, 3, False, [3], [3, 4, 1]),
        (0, 3, False, [0], [3, 4, 1]),  # over the prompt, for its KV alone
        (0, 3, True, [], [3, 4, 1]),
        (0, 0, False, [0], [-1, -1, -1]),
        (0, 0, True, [], [-1, -1, -1]),
    ],
)
def test_the_draft_runs_where_the_scheduler_s_side_says_so(
    current: Session, drafting: int, length: int, sits_out: bool, drafted: list[int], proposed: list[int]
) -> None:
    runner, _, control = hooked(current, sits_out)
    control.scheduler.draft_length, control.scheduler.preferred_copies = drafting, (1 << NUM_KINDS) - 1
    assert runner.step(TEXT, length) == proposed
    assert runner.drafted == drafted
    runner.step([*TEXT, 3], length)
    assert runner.drafted == drafted + [length] * (drafting > 0)  # a step of decoding


def test_what_is_not_preferred_is_not_proposed(current: Session) -> None:
    runner, _, control = hooked(current)
    control.scheduler.draft_length = 3
    assert runner.step(TEXT) == [9, 9, 9]


@pytest.mark.parametrize("drafting", [3, 0])
def test_after_a_fault_the_draft_proposes_for_itself(current: Session, drafting: int) -> None:
    """And in the step of the fault whatever is verified is a token, never the -1 that stands for none."""
    runner, copying, control = hooked(current)
    control.scheduler.draft_length = drafting
    runner.step(TEXT)
    del runner.req_states.total_len
    assert runner.step([*TEXT, 3]) == ([9, 9, 9] if drafting else [0, 0, 0])
    assert not control.worker.copies_on_device
    assert runner.step([*TEXT, 3, 4]) == [9, 9, 9]  # though the scheduler's side does not know it yet
    come(copying)


def test_the_scheduler_s_side_learns_what_was_counted(current: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "FETCH_EVERY", 1)
    runner, _, control = hooked(current)
    advisor = SpeculationAdvisor(current, POSITIONS, "off: not yet", lengths=(1, 2, 3))
    assert control.scheduler.copying == "off: not yet"
    control.scheduler.draft_length, control.worker.live_version = 3, 4
    step = SimpleNamespace(
        num_scheduled_tokens={"a": 1}, scheduled_spec_decode_tokens={}, num_spec_tokens_to_schedule=0,
        finished_req_ids=set(),
    )  # fmt: skip

    def look() -> None:
        advisor.step_starts()
        advisor.step_ends(step, [[1]])

    control.scheduler.preferred_copies = 0
    runner.step(TEXT)
    runner.step([*TEXT, 3], verified=3)  # the draft's nines: none of three
    look()
    scheduler = control.scheduler
    assert scheduler.copying == "on"
    assert [(row.version, row.num_drafts, row.num_accepted) for row in scheduler.acceptance()] == [(4, 1, 0)]
    assert scheduler.preferred_copies == sum(1 << kind for kind in range(1, NUM_KINDS))  # a copy was right, none wrong
    runner.step([*TEXT, 3, 4], verified=3)  # again the draft's: the worker saw the word of before
    runner.step([*TEXT, 3, 4, 1, 2, 8], verified=3)  # copied: two of three
    look()
    assert (scheduler.copied_drafts, scheduler.copied_tokens, scheduler.copied_accepted) == (1, 3, 2)
    advisor.verified(3, 2, "a")  # vLLM says it once more
    assert scheduler.copied_drafts == 1 and sum(row.num_drafts for row in scheduler.acceptance()) == 2
    control.worker.copies_on_device = False
    look()
    assert scheduler.copying.startswith("failed in the worker")
    advisor.verified(3, 0, "a")
    assert sum(row.num_drafts for row in scheduler.acceptance()) == 3


@pytest.mark.parametrize(("right", "decision"), [(0.7, "keep"), (0.6, "keep"), (0.3, "rollback")])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_version_is_judged_by_verdicts_that_come_together(
    current: Session, batch: int, right: float, decision: str
) -> None:
    """As a device delivers them, those of 16 steps at once, of which 64 are looked at; the version before had 0.6."""
    advisor, control = SpeculationAdvisor(current, POSITIONS, "off", lengths=(1, 2, 3)), control_of(current)
    rng = random.Random(batch)
    for version, chance in ((1, 0.6), (2, right)):
        control.worker.previous_version, control.worker.live_version = version - 1, version
        for _ in range(max(-(-1000 // (16 * batch)), 12)):
            accepted = (next((i for i in range(3) if rng.random() >= chance), 3) for _ in range(16 * batch))
            advisor._take_verdicts(version, Counter((3, count) for count in accepted))
    assert advisor._rollback_watch._rollout.decision == decision


@pytest.mark.parametrize(
    ("batch", "asked", "fits"),
    [(1, 8, 8), (3, 8, 8), (4, 8, 3), (8, 8, 3), (9, 3, 2), (16, 8, 1), (17, 8, 0), (4, 0, 0)],
)
def test_half_a_step_is_left_to_those_who_wait(current: Session, batch: int, asked: int, fits: int) -> None:
    """Of 64 tokens. All proposals have one length, and vLLM goes through the requests in their order."""
    advisor = SpeculationAdvisor(current, 8, "off", budget=64, lengths=(1, 2, 3, 8))
    advisor._controller.decide = lambda _: Decision(min(asked, 3), "test", "whole", False, asked)  # type: ignore[method-assign]
    advisor.step_starts()
    assert advisor.draft_length(batch) == fits
    assert advisor._steps._steps[-1].drafted == min(asked, 3, fits)
    alone = SpeculationAdvisor(current, 8, "", budget=64)  # proposals are cut one by one where they pass the scheduler
    alone._controller.decide = advisor._controller.decide  # type: ignore[method-assign]
    assert alone.draft_length(batch) == asked


def test_a_choice_that_fails_proposes_nothing(current: Session) -> None:
    advisor = SpeculationAdvisor(current, 8, "off", lengths=(1, 2, 3, 8))
    advisor._last = Decision(3, "before", "whole", False, 8)

    def fail(_: int) -> Decision:
        raise RuntimeError("broken on purpose")

    advisor._controller.decide = fail  # type: ignore[method-assign]
    assert advisor.draft_length(1) == 0 and (advisor._last.draft_length, advisor._last.proposed) == (0, 0)
    assert control_of(current).scheduler.draft_length == 0


def test_requests_that_end_before_they_speak_are_forgotten(current: Session) -> None:
    _, copying, _ = hooked(current)
    assert set(copying._copies._untold) == {"a"}
    copying.requests_change(SimpleNamespace(finished_req_ids=["a"], scheduled_new_reqs=[]))  # type: ignore[arg-type]
    assert not copying._copies._untold


def test_verdicts_on_an_older_version_say_nothing_of_the_live_one(current: Session) -> None:
    advisor, control = SpeculationAdvisor(current, POSITIONS, "off", lengths=(1, 2, 3)), control_of(current)
    control.worker.live_version = 5
    for version in (4, 5):
        advisor._take_verdicts(version, {(3, 3): 10})
    assert advisor._controller.acceptance._live.trials[0] == pytest.approx(10, rel=0.02)
    counted = [(row.version, row.num_drafts, row.accepted_per_position[:4]) for row in control.scheduler.acceptance()]
    assert counted == [(4, 10, (10, 10, 10, 0)), (5, 10, (10, 10, 10, 0))]
    assert advisor._rollback_watch._rollout.version == 5


def test_copies_come_and_go_with_the_worker_s_word(current: Session) -> None:
    """What is asked of the scheduler: as many tokens as are to be verified, drafted or copied."""
    control = control_of(current)
    control.worker.copies_on_device = True
    advisor = SpeculationAdvisor(current, POSITIONS, "off", lengths=(1, 2, 3))
    controller, asked = advisor._controller, []
    for number in range(80):
        controller.costs.observe(1, 0, 0, 0.01)
        advisor.step_starts()
        asked.append(advisor.draft_length(1))
        assert advisor._steps._steps.pop().drafted == control.scheduler.draft_length == 0
        if number == 20:
            assert controller.copies is not None
            controller.copies.take([0, 100, *[0] * (NUM_KINDS - 2)], {}, {1: {(3, 3): 100}})
        if number == 60:
            control.worker.copies_on_device = False
    assert set(asked[:20]) == {0} and set(asked[50:60]) == {3} and set(asked[70:]) == {0}


def test_the_rehearsal_is_over_when_vllm_begins_to_watch_for_late_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    from aurora_vllm.spec_decode.worker import AuroraWorker, PlatformWorker

    said: list[str] = []
    worker = AuroraWorker.__new__(AuroraWorker)
    worker._aurora = SimpleNamespace(start_serving=lambda: said.append("rehearsed"))  # type: ignore[assignment]
    monkeypatch.setattr(PlatformWorker, "_maybe_activate_jit_monitor", lambda worker: said.append("watched"))
    worker._maybe_activate_jit_monitor()
    assert said == ["rehearsed", "watched"]


def test_a_worker_that_cannot_start_says_so(current: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_vllm.spec_decode.attachment.place", lambda *_, **__: 1 / 0)
    attachment = Attachment(current, Straw(), V2Adapter)
    attachment.start_serving()
    worker = attachment.control.worker
    assert not attachment.serving and not worker.attached and not worker.copies_on_device
    assert worker.message == "could not start: ZeroDivisionError: division by zero"


def test_a_server_s_worker_begins_by_itself(current: Session) -> None:
    attachment = Attachment(current, Straw(), V2Adapter)
    assert not attachment.control.worker.copies_on_device
    attachment.start_serving()
    assert attachment.control.worker.copies_on_device and attachment._adapter.copying is attachment._copying  # type: ignore[union-attr]
    new = SimpleNamespace(
        req_id="a", prompt_token_ids=[1, 2], sampling_params=SimpleNamespace(extra_args=None, temperature=0.0)
    )
    step = SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=[new], total_num_scheduled_tokens=2)
    attachment.step_starts(step)  # type: ignore[arg-type]
    assert set(attachment._copying._copies._untold) == {"a"}  # type: ignore[union-attr]


def test_the_block_has_room(current: Session) -> None:
    assert len(control_of(current).worker.copy_counts) >= CountsLayout(8).size
