"""From the weight bank to the live draft: staged on a thread, committed between two steps, undone by trading back."""

from __future__ import annotations

import logging
import threading
import time

from aurora_vllm.spec_decode.swap import LiveDraft, StagedWeights, SwapRefused
from aurora_vllm.transport.bank import TornPublish, WeightBank
from aurora_vllm.transport.control import ControlBlock

logger = logging.getLogger("vllm.aurora")

POLL_SECONDS = 0.05


class Stager:
    """Watches the bank, prepares new versions, and makes them live when the worker says so.

    Args:
        bank: reader's side of the weight bank.
        draft: the running draft.
        control: the ``worker`` block is updated here.
    """

    def __init__(self, bank: WeightBank, draft: LiveDraft, control: ControlBlock) -> None:
        self.bank = bank
        self.draft = draft
        self._worker = control.worker
        self._seen = 0  # newest version looked at, taken or refused
        self._ready: StagedWeights | None = None
        self._previous: StagedWeights | None = None
        self._stop = threading.Event()
        self._hold()
        self._thread = threading.Thread(target=self._watch, name="aurora-stager", daemon=True)
        self._thread.start()

    def commit_if_ready(self) -> None:
        """Called between two steps, on the worker's thread. Costs one attribute look-up when there is nothing new."""
        staged, self._ready = self._ready, None
        if staged is None:
            return
        started = time.perf_counter_ns()
        staged.exchange()
        stall = time.perf_counter_ns() - started
        worker = self._worker
        previous = int(worker.live_version)
        worker.live_version, worker.previous_version = staged.version, previous
        worker.swaps += 1
        worker.last_swap_ns = time.monotonic_ns()
        worker.last_swap_stall_us = stall / 1000
        self._previous = StagedWeights(previous, staged.exchanges)  # what was exchanged out
        self._hold()

    def roll_back(self) -> bool:
        """Make the previous version live again, between two steps. Returns whether there was one.

        The version that leaves is kept in turn, so a second call undoes the first.
        """
        if self._previous is None:
            return False
        self._ready = self._previous
        self.commit_if_ready()
        return True

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _hold(self) -> None:
        self.bank.hold(live=int(self._worker.live_version), previous=int(self._worker.previous_version))

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            version = self.bank.published()
            if version <= self._seen or self._ready is not None:
                continue
            self._seen = version
            try:
                self._ready = self._stage(version)
                self._worker.staged_version = version
            except (SwapRefused, TornPublish) as refusal:
                self._refuse(version, str(refusal))
            except Exception as error:  # a bug here must cost a version, not the server
                logger.exception("aurora: staging version %d failed", version)
                self._refuse(version, f"{type(error).__name__}: {error}")

    def _stage(self, version: int) -> StagedWeights:
        publication = self.bank.read(version)
        staged = self.draft.stage(version, publication.tensors)
        if not publication.still_valid():
            raise TornPublish(f"version {version} changed while it was being read")
        return staged

    def _refuse(self, version: int, reason: str) -> None:
        self._worker.refusals += 1
        self._worker.refusal = f"version {version}: {reason}"
        logger.warning("aurora: version %d refused, version %d stays: %s", version, self._worker.live_version, reason)
