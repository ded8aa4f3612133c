"""Everything Aurora does in the worker process (capture, swaps, copies), tied to one session."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from aurora_vllm.session import CHECKPOINT_VERSION, Session
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.spec_decode.consent import may_learn
from aurora_vllm.spec_decode.device_copying import DeviceCopying
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.kernel_trial import try_kernels
from aurora_vllm.spec_decode.rehearsal import prepare_fill
from aurora_vllm.spec_decode.row_fill import RowFill
from aurora_vllm.spec_decode.runner_v1 import V1Adapter
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.spec_decode.stager import Stager
from aurora_vllm.spec_decode.swap import LiveDraft
from aurora_vllm.spec_decode.target_head import find_target_head
from aurora_vllm.spec_decode.trace import StepTrace, TraceWriter
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.placement import CPU, lend_target_head, place
from aurora_vllm.transport.rows import LARGEST_STEP, RowLayout
from aurora_vllm.transport.segment import Segment

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("vllm.aurora")


def find_adapter(runner: Any) -> type[V1Adapter] | type[V2Adapter] | None:
    """The adapter for a model runner, chosen by its attributes rather than by its class or version."""
    if callable(getattr(getattr(runner, "speculator", None), "propose", None)) and hasattr(runner, "sample"):
        return V2Adapter
    if hasattr(runner, "drafter") and hasattr(runner, "propose_draft_token_ids"):
        return V1Adapter
    return None


class Attachment:
    """Capture and swaps in the worker process. No method raises into the serving path.

    To be made after ``load_model``; :meth:`start_serving` is called when vLLM has warmed up.

    Args:
        session: of this run.
        runner: vLLM's model runner after ``load_model``.
        adapter: for this runner, see :func:`find_adapter`.
        device: the target's.
    """

    _started = False
    serving = False  # until vLLM has warmed up, which it does with requests of its own

    def __init__(
        self, session: Session, runner: Any, adapter: type[V1Adapter] | type[V2Adapter], device: torch.device = CPU
    ) -> None:
        self.control = ControlBlock.attach(Segment.attach(session.control))
        self.session, self.device = session, device
        self._runner = runner
        self.stager: Stager | None = None
        self._copying: DeviceCopying | None = None
        worker = self.control.worker
        worker.pid, worker.model_runner = os.getpid(), adapter.model_runner
        worker.live_version = CHECKPOINT_VERSION
        # One for each job: following requests may succeed for ever while writing steps always fails.
        self.capture = CircuitBreaker("capture", on_failure=self._count_capture_error)
        self.following = CircuitBreaker("following requests", on_failure=self._count_capture_error)
        self._adapter = adapter(
            runner,
            on_step=self._on_step,
            on_propose=self._on_propose,
            sits_out=lambda: self.control.scheduler.draft_sits_out,
        )

    def start_serving(self) -> None:
        """Open ring and bank, and begin to capture and to swap. Called after vLLM's profiling and warm-up, so that none
        of this memory counts as the model's. A second call does nothing."""
        if self._started:
            return
        self._started = True
        session, worker = self.session, self.control.worker
        try:
            ring, bank = Segment.attach(session.ring), Segment.attach(session.bank)
            producer, weights = place(ring, bank, self.device, worker, wanted=session.on_device)
            layout = session.row_layout
            kernels_work = self._try_kernels(layout)
            lend_target_head(
                lambda: find_target_head(self._runner.get_model(), layout.hidden_size, layout.dtype), worker
            )
            self.writer = TraceWriter(
                sink=producer,
                layout=layout,
                control=self.control,
                sample_rate=session.config.sample_rate,
                fill=self._prepare_fill(layout, producer.device, kernels_work) if session.config.learn else None,
            )
            self.stager = self._make_stager(weights)
        except Exception as error:
            logger.exception("aurora: could not start; serving goes on without capture and swaps")
            worker.message = f"could not start: {type(error).__name__}: {error}"
            return
        if isinstance(self._adapter, V2Adapter) and kernels_work:
            self._copying = DeviceCopying.begin(session, self._runner, self.control, self.device)
            self._adapter.copying = self._copying
        worker.capture_on, worker.message = self._captures, self._nothing_to_capture()
        worker.attached = True  # the learner may start
        self.serving = True

    @classmethod
    def to_worker(cls, worker: Any) -> Attachment | None:
        """Attach to a vLLM worker whose model is loaded. None where there is no session, or where it fails; then the
        control block says why. Never raises."""
        session: Session | None = None
        try:
            session = Session.from_environment()
            if session is None:
                return None
            runner = worker.model_runner
            if (adapter := find_adapter(runner)) is not None:
                return cls(session, runner, adapter, getattr(worker, "device", None) or CPU)
            why = f"{type(runner)} has neither the V1 runner's drafter nor the V2 runner's speculator"
            logger.warning("aurora: %s; serving goes on as plain vLLM", why)
        except Exception as error:
            logger.exception("aurora: could not attach; serving goes on as plain vLLM")
            why = f"{type(error).__name__}: {error}"
        if session is not None:
            with suppress(Exception):  # the control block itself may be what failed
                ControlBlock.attach(Segment.attach(session.control)).worker.message = f"could not attach: {why}"
        return None

    def step_starts(self, scheduler_output: SchedulerOutput) -> None:
        """Between two steps: new weights go live, and requests come and go."""
        if not self.serving:
            return
        self.control.worker.beat()
        self.control.worker.step += 1
        if self.stager is not None:
            self.stager.commit_if_ready()
        if self._copying is not None:
            self._copying.requests_change(scheduler_output)
        if self._captures:
            self.following.run(lambda: self._follow_requests(scheduler_output))

    def close(self) -> None:
        """End the stager's thread."""
        if self.stager is not None:
            self.stager.close()

    def _follow_requests(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_req_ids:
            self.writer.end(request_id)
        for new in step.scheduled_new_reqs:
            params = new.sampling_params
            if params is None or not new.prompt_token_ids:
                continue
            self.writer.begin(
                new.req_id,
                prompt_length=len(new.prompt_token_ids),
                temperature=params.temperature,
                may_learn=may_learn(params),
            )
        if not step.total_num_scheduled_tokens:
            self.writer.flush_ends()  # nothing will be written in this step, because the last request just ended

    def _on_step(self, build: Callable[[], StepTrace]) -> None:
        if self.serving and self._captures:
            self.capture.run(lambda: self.writer.write(build()))

    def _on_propose(self) -> int:
        worker = self.control.worker
        worker.proposed_step = worker.step
        return worker.live_version

    @property
    def _captures(self) -> bool:
        """Not without a learner, who would read the rows; nor if following requests fails, because rows are useless
        without their requests' beginnings and ends."""
        return self.session.config.learn and not (self.capture.open or self.following.open)

    def _nothing_to_capture(self) -> str:
        """Why the settings ask for no rows; "" where they do ask for some."""
        if not self.session.config.learn:
            return "off: there is no learner, by the settings"
        return "" if self.session.config.sample_rate else "no request is captured: sample_rate is 0"

    def _count_capture_error(self, message: str) -> None:
        worker = self.control.worker
        worker.capture_errors += 1
        worker.message = message
        worker.capture_on = self._captures

    def _try_kernels(self, layout: RowLayout) -> bool:
        if not (self.session.config.learn or self.session.config.prompt_lookup):
            return True  # none will be launched
        positions = getattr(getattr(self._runner, "speculator", None), "num_speculative_steps", 0)
        if why_not := try_kernels(layout, self.device, int(positions)):
            logger.warning(
                "aurora: kernels of its own do not work on %s (%s): nothing is copied, rows are written by torch",
                self.device,
                why_not,
            )
        return not why_not

    def _prepare_fill(self, layout: RowLayout, ring: torch.device, with_kernel: bool) -> RowFill:
        most_rows = getattr(self._runner, "max_num_tokens", LARGEST_STEP)
        return prepare_fill(layout, ring, self.device, most_rows, with_kernel)

    def _make_stager(self, bank: WeightBank) -> Stager | None:
        """None where this draft cannot take other weights; the control block then says why."""
        try:
            draft = LiveDraft(self._runner.get_draft_model(), self._runner.get_model())
            draft.check(bank.specs)
            return Stager(bank, draft, self.control, self.device)
        except SwapRefused as refusal:
            logger.warning("aurora: weights cannot be swapped: %s", refusal)
            self.control.worker.refusal = str(refusal)
        except Exception as error:  # in the rehearsal, most likely for lack of memory; capture works without
            logger.exception("aurora: weights cannot be swapped")
            self.control.worker.refusal = f"{type(error).__name__}: {error}"
        return None
