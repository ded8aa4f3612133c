"""Copies on the device, tied to a session: passes the scheduler's decisions in and the counts out.

A fault costs copies, not requests: copying is off until the next start, and the scheduler is told to rely on its own
verdicts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aurora_vllm.session import Session
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.transport.control import ControlBlock

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.sched.output import SchedulerOutput

    from aurora_vllm.spec_decode.device_copies import DeviceCopies

logger = logging.getLogger("vllm.aurora")


class DeviceCopying:
    """Use :meth:`begin`. No method raises.

    Args:
        copies: of this runner.
        control: its ``worker`` part is written.
    """

    def __init__(self, copies: DeviceCopies, control: ControlBlock) -> None:
        self._copies, self._control = copies, control
        self._breaker = CircuitBreaker("copying drafts", limit=1, on_failure=self._stop)
        control.worker.copies_on_device = True

    @classmethod
    def begin(cls, session: Session, runner: Any, control: ControlBlock, device: torch.device) -> DeviceCopying | None:
        """For a V2 runner that is ready to serve; None where copying is off or impossible."""
        config, speculator = session.config, runner.speculator
        if not config.prompt_lookup or config.speculate == "never":
            return None
        if getattr(speculator, "draft_logits", None) is not None:
            return None  # drafts are sampled, and a copy has no probabilities
        try:
            from aurora_vllm.spec_decode.device_copies import DeviceCopies  # needs Triton, which the V1 runner does not

            positions = int(speculator.num_speculative_steps)
            copies = DeviceCopies(runner.req_states, positions, config.prompt_lookup_answers, device)
            copies.rehearse()
        except Exception:
            logger.exception("aurora: drafts cannot be copied on this device; serving goes on without")
            return None
        return cls(copies, control)

    @property
    def beside_drafts(self) -> bool:
        """Whether the draft is to run; else only copies are proposed.

        Outside the scheduler's process this may already be the decision for the next of two overlapping steps. Then a
        step drafts in vain, or goes without drafts.
        """
        return not self._control.worker.copies_on_device or self._control.scheduler.draft_length > 0

    def requests_change(self, step: SchedulerOutput) -> None:
        """Before a step: requests begin, come back and end."""
        self._breaker.run(lambda: self._follow(step))

    def _follow(self, step: SchedulerOutput) -> None:
        for name in step.finished_req_ids:
            self._copies.end(name)
        for new in step.scheduled_new_reqs:
            if new.sampling_params is not None:
                self._copies.begin(new.req_id, new.sampling_params)

    def replace(self, batch: Any, given: Mapping[str, Any], proposed: torch.Tensor, drafted_by: int | None) -> None:
        """After a step's drafting: put copies in place.

        Args:
            batch: vLLM's ``InputBatch`` of R requests.
            given: arguments of ``propose`` by name.
            proposed: int64 [R, positions], edited in place.
            drafted_by: version of the draft that proposed; None: the draft did not run.
        """
        length = given["num_speculative_tokens"]
        if drafted_by is None and length:
            proposed.fill_(0)  # any token but -1, because it is verified even if something below fails
        preferred = self._control.scheduler.preferred_copies
        judged = given["num_sampled"], given["num_rejected"]
        if self._breaker.run(lambda: self._copies.replace(batch, *judged, proposed, length, drafted_by, preferred)):
            self._breaker.run(self._report)

    def _report(self) -> None:
        counts, worker = self._copies.fetch(), self._control.worker
        if counts is not None:
            worker.copy_counts = counts
            worker.copy_counts_taken += 1

    def _stop(self, _: str) -> None:
        self._control.worker.copies_on_device = False
