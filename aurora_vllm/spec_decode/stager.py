"""Takes versions from the weight bank to the live draft: staged on a thread, swapped in between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from aurora_vllm.spec_decode.breaker import CircuitBreaker
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.exchange import HalfExchanged, StagedWeights
from aurora_vllm.spec_decode.swap import LiveDraft
from aurora_vllm.transport.bank import Publication, TornPublish, WeightBank
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.placement import CPU
from aurora_vllm.transport.waits import wait_for_this_stream

logger = logging.getLogger("vllm.aurora")

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class _Ready:
    """A version that waits for the next step boundary, and the publication it was read from."""

    weights: StagedWeights
    publication: Publication


@dataclass(frozen=True)
class _Replaced:
    """The previous version, ready for a rollback."""

    weights: StagedWeights
    lineage: int


class Stager:
    """Watches the bank, prepares new versions, and makes them live between two steps. To be made before anything is
    served: it rehearses an exchange of the live weights with themselves.

    Args:
        bank: reader's side of the weight bank.
        draft: the running draft.
        control: the ``worker`` part is written; the ``scheduler`` part says which version to roll back.
        device: the draft's.

    Raises:
        SwapRefused: as :meth:`.swap.LiveDraft.stage`.
    """

    def __init__(self, bank: WeightBank, draft: LiveDraft, control: ControlBlock, device: torch.device = CPU) -> None:
        self.bank = bank
        self.draft = draft
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._worker, self._scheduler = control.worker, control.scheduler
        self._seen = 0  # newest version examined, taken or refused
        self._ready: deque[_Ready] = deque(maxlen=1)  # for the next boundary; append and pop are atomic
        self._previous: _Replaced | None = None
        self._stop = threading.Event()
        # A fault ends swapping, not the server. After one failure, because it is not known what is live then.
        self._swapping = CircuitBreaker("swapping weights", limit=1, on_failure=self._end)
        self._hold()
        self._rehearse()
        self._thread = threading.Thread(target=self._watch, name="aurora-stager", daemon=True)
        self._thread.start()

    def _rehearse(self) -> None:
        """Rehearse on the stream that versions are staged on: torch caches freed memory by stream, so later versions
        reuse what this frees. The cache is not emptied, because vLLM leaves memory in it on purpose at the end of its
        warm-up."""
        wait_for_this_stream(self._device)
        with self._own_stream():
            self.draft.rehearse(self.bank.specs)
            wait_for_this_stream(self._device)

    def commit_if_ready(self) -> None:
        """Called between two steps, on the worker's thread: roll back if the scheduler asks for it, then take a new
        version.

        Costs little when there is nothing to do, and never raises.
        """
        self._swapping.run(self._commit)

    def _commit(self) -> None:
        if condemned := self._scheduler.roll_back_version:
            self._undo(condemned)
        if (ready := self._take()) is not None and self._claim(ready):
            self._go_live(ready.weights, ready.publication.lineage)

    def _take(self) -> _Ready | None:
        try:
            return self._ready.pop()
        except IndexError:
            return None

    def _claim(self, ready: _Ready) -> bool:
        """Have the bank keep the version that is about to go live; after a rollback of its successor the learner reads
        it.

        False if a newer publish has taken the slot meanwhile; that version will be staged in turn.
        """
        self.bank.hold(live=ready.weights.version, previous=self._worker.live_version)
        if ready.publication.still_valid():
            return True
        self._hold()
        return False

    def _go_live(self, staged: StagedWeights, lineage: int) -> bool:
        """Returns whether it went live; if not, the live version stays. Raises HalfExchanged."""
        started = time.perf_counter_ns()
        try:
            staged.exchange()
        except HalfExchanged:
            raise
        except Exception as error:
            logger.exception("aurora: version %d could not go live; what was exchanged was undone", staged.version)
            self._refuse(staged.version, f"{type(error).__name__}: {error}")
            self._hold()
            return False
        stall = time.perf_counter_ns() - started
        worker = self._worker
        previous, before = worker.live_version, worker.live_lineage
        worker.live_version, worker.previous_version = staged.version, previous
        worker.live_lineage = lineage
        worker.swaps += 1
        worker.last_swap_ns = time.monotonic_ns()
        worker.last_swap_stall_us = stall / 1000
        self._previous = _Replaced(StagedWeights(previous, staged.exchanges), before)  # they now hold the old weights
        self._hold()
        logger.info("aurora: draft version %d is live (was %d), %.2f ms", staged.version, previous, stall / 1e6)
        return True

    def roll_back(self) -> bool:
        """Make the previous version live again, between two steps. Returns whether it is.

        The version that leaves is kept in turn, so a second call undoes the first, unless it was rolled back for good.
        """
        previous = self._previous
        if previous is None or previous.weights.version == self._worker.rolled_back_version:
            return False
        self._previous = None
        if self._go_live(previous.weights, previous.lineage):
            return True
        self._worker.previous_version = 0  # its weights may be damaged
        self._hold()
        return False

    def _undo(self, condemned: int) -> None:
        """Roll a version back for good, if it is the live one."""
        worker = self._worker
        if condemned != worker.live_version or not self.roll_back():
            return
        # For good: the watcher is past this version, and a watcher that starts anew looks at this field.
        worker.rolled_back_version = condemned
        worker.rollbacks += 1
        worker.rollback = f"back to version {worker.live_version}: {self._scheduler.probation}"
        logger.warning("aurora: %s", worker.rollback)

    def close(self) -> None:
        """End the watcher; the live version stays."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _hold(self) -> None:
        self.bank.hold(live=self._worker.live_version, previous=self._worker.previous_version)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            version = self.bank.published()
            if version <= self._seen or version == self._worker.rolled_back_version:
                continue
            self._seen = version
            self._take()  # drop an older version that an idle server has not taken: two would take twice the memory
            try:
                self._ready.append(self._stage(version))
                self._worker.staged_version = version
            except (SwapRefused, TornPublish) as refusal:
                self._refuse(version, str(refusal))
            except Exception as error:  # a fault costs a version, not the server
                logger.exception("aurora: staging version %d failed", version)
                self._refuse(version, f"{type(error).__name__}: {error}")

    def _stage(self, version: int) -> _Ready:
        with self._own_stream():
            publication = self.bank.read(version)
            staged = self.draft.stage(version, publication.tensors)
        if not publication.still_valid():
            raise TornPublish(f"version {version} changed while it was being read")
        return _Ready(staged, publication)

    def _own_stream(self) -> AbstractContextManager[object]:
        """A CUDA stream for this thread's copies; on the default stream the model's next step would wait for them. The
        same one for all versions, because torch caches freed memory by stream."""
        if self._device.type != "cuda":
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._stream)

    def _end(self, reason: str) -> None:
        """Stop staging, because no version can go live any more."""
        self._stop.set()
        self._worker.refusals += 1
        self._worker.refusal = f"weights are not swapped until restart: {reason}"

    def _refuse(self, version: int, reason: str) -> None:
        self._worker.refusals += 1
        self._worker.refusal = f"version {version}: {reason}"
        logger.warning("aurora: version %d refused, version %d stays: %s", version, self._worker.live_version, reason)
