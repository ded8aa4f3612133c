"""Edits proposals on their way from the worker to vLLM's scheduler: replaces, cuts or removes them.

Only where proposals pass through the scheduler, that is where steps do not overlap. (With the V2 runner these are
placeholders, some of which are removed.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aurora_vllm.control.copying import Copies
from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.spec_decode.copying import DraftCopier
from aurora_vllm.spec_decode.undrafted import leave_out_drafts
from aurora_vllm.transport.control import ControlBlock


class Proposals:
    """Edits every step's proposals.

    Args:
        control: tells whether the worker proposed anything; the state of copying is written to it.
        positions: the most copied tokens in a proposal.
        answers: tokens of earlier answers that may be copied.
        no_copies: why nothing can be copied, in words; "" where it can.
        budget: the most tokens that vLLM schedules in a step; None for no bound.
    """

    def __init__(
        self, control: ControlBlock, positions: int, answers: int, no_copies: str = "", budget: int | None = None
    ) -> None:
        self.for_nobody = False  # whether all running requests are such that take no drafts
        self._control, self._budget = control, budget
        self._copier = None if no_copies else DraftCopier(positions, answers)
        self._copying = CircuitBreaker("copying drafts", on_failure=self._say_copying_failed)
        self._forgetting = CircuitBreaker("keeping answers to copy from")
        self._checking = CircuitBreaker("checking who takes drafts")
        self._say_copying(no_copies or "on")

    @property
    def copies(self) -> Copies | None:
        """Statistics of copies; None where there are none."""
        return self._copier.copies if self._copier else None

    def copied(self, name: str) -> bool:
        """Whether the proposal of a request that is being verified is a copy."""
        return self._copier is not None and self._copier.copied(name)

    def arrived(self, proposals: Any, requests: Mapping[str, Any], worth: Callable[[int, bool], int]) -> None:
        """Edit a vLLM ``DraftTokenIds`` in place.

        Args:
            proposals: ``req_ids`` and ``draft_token_ids``, a list of int lists.
            requests, worth: as for :meth:`DraftCopier.replace`.
        """
        worker = self._control.worker
        if worker.proposed_step != worker.step:
            # If one request is near the draft's longest context, vLLM drafts for none, and hands over zeros for all.
            _empty(proposals)
        if (copier := self._copier) is not None:
            done = self._copying.run(lambda: copier.replace(proposals, requests, worth))
            if done and self._copies_are != "on":
                self._say_copying("on")
        if not self._checking.run(lambda: self._check(proposals, requests)):
            _empty(proposals)  # so that requests that must not have drafts have none

    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended."""
        if (copier := self._copier) is not None:
            self._forgetting.run(lambda: copier.forget(names))

    def _check(self, proposals: Any, requests: Mapping[str, Any]) -> None:
        self.for_nobody = leave_out_drafts(proposals, requests)
        if self._budget is not None:
            cut_to(self._budget, proposals.draft_token_ids)

    def _say_copying_failed(self, message: str) -> None:
        self._say_copying(f"failed: {message}")

    def _say_copying(self, state: str) -> None:
        self._copies_are = self._control.scheduler.copying = state


def _empty(proposals: Any) -> None:
    proposals.draft_token_ids[:] = [[] for _ in proposals.req_ids]


def cut_to(budget: int, drafts: list[list[int]]) -> None:
    """Cut proposals, the longest first, so that a step has room for every running request. vLLM fills a step in the
    order of requests: the first would verify their whole proposals, and the last would wait until those have ended.

    Args:
        budget: tokens of a step; a request takes one, plus its proposal.
    """
    if len(drafts) + sum(map(len, drafts)) <= budget:
        return
    longest = max(map(len, drafts))
    while longest and len(drafts) + sum(min(len(draft), longest) for draft in drafts) > budget:
        longest -= 1
    for draft in drafts:
        del draft[longest:]
