"""StepTrace, the record of one step, and TraceWriter, which writes it into the ring as rows.

A runner adapter fills a StepTrace with the runner's own tensors. Nothing here waits for a value from the device:
lengths and draft counts are known to the host before the step runs, and verdicts stay tensors.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from aurora_vllm.spec_decode.open_request import OpenRequest
from aurora_vllm.spec_decode.row_fill import KnownRows, RowFill, TorchFill
from aurora_vllm.spec_decode.upload import upload
from aurora_vllm.transport.rows import META_WORDS, Field, RowLayout

if TYPE_CHECKING:
    from aurora_vllm.transport.control import ControlBlock


_STEP, _DRAFT_VERSION = int(Field.STEP), int(Field.DRAFT_VERSION)


# What a TraceWriter counts in the worker's part of the control block.
COUNTERS = ("requests_seen", "requests_captured", "requests_opted_out", "requests_dropped", "rows_written")


class RowSink(Protocol):
    """The producer's side of the ring (transport.ring.RingProducer)."""

    def free(self) -> int: ...
    def reserve(self, n: int) -> list[torch.Tensor] | None: ...
    def commit(self) -> None: ...


@dataclass
class StepTrace:
    """One engine step over a batch of R requests and N tokens, in batch order.

    A request's rows are contiguous; the last ``num_drafts[i]`` of them are the draft tokens under verification, and the
    row before those is the last certain token.
    """

    request_ids: Sequence[str]  # [R] vLLM's internal ids
    lengths: Sequence[int]  # [R] rows of each request in this step; they sum to N
    num_drafts: Sequence[int]  # [R]
    emits: Sequence[bool]  # [R] False inside a chunked prefill, where the sampled token is discarded
    token_ids: torch.Tensor  # [N] integer
    positions: torch.Tensor  # [N] integer
    aux_hidden_states: Sequence[torch.Tensor]  # each [>=N, H], input of an aux layer (vLLM SupportsEagle3)
    last_hidden_states: torch.Tensor  # [>=N, H] after the final norm: what lm_head reads
    sampled: torch.Tensor  # [R, >=1 + max(num_drafts)] accepted drafts and the token after them, then -1
    draft_version: int  # of the weights that proposed these drafts


@dataclass
class TraceWriter:
    """Writes steps into the ring; when there is no room, it drops whole requests and counts them.

    Args:
        sink: producer side of the ring.
        layout: row layout shared with the learner.
        control: its ``worker`` part is written.
        sample_rate: share of requests that are captured.
        seed: of the sampling and of the request numbers; None for random ones.
        fill: how rows are filled; by default by torch.
    """

    sink: RowSink
    layout: RowLayout
    control: ControlBlock
    sample_rate: float = 1.0
    seed: int | None = None
    fill: RowFill | None = None
    _open: dict[str, OpenRequest] = field(default_factory=dict)
    _ended: deque[OpenRequest] = field(default_factory=deque)
    _step: int = 0

    def __post_init__(self) -> None:
        self._fill = self.fill or TorchFill(self.layout)
        # By default the operating system's randomness, so that request numbers cannot be guessed from one another.
        self._random = random.Random(self.seed) if self.seed is not None else random.SystemRandom()

    @property
    def rows_by(self) -> str:
        """What fills the rows: ``"one kernel"`` or ``"torch"``."""
        return self._fill.name

    def begin(self, request_id: str, prompt_length: int, temperature: float, may_learn: bool) -> None:
        """A request entered the batch. One that resumes after preemption keeps its number."""
        if request_id in self._open:
            return
        worker = self.control.worker
        worker.requests_seen += 1
        if not may_learn:
            worker.requests_opted_out += 1
            return
        if self.sample_rate < 1.0 and self._random.random() >= self.sample_rate:
            return
        worker.requests_captured += 1
        self._open[request_id] = OpenRequest(
            key=self._random.getrandbits(62), prompt_length=prompt_length, temperature_milli=round(temperature * 1000)
        )

    def end(self, request_id: str) -> None:
        """A request left: finished, aborted, or out of length."""
        request = self._open.pop(request_id, None)
        if request is not None and request.wrote:  # else the learner does not know of it
            self._ended.append(request)

    def flush_ends(self) -> None:
        """Write the end rows that are due; without room they wait for the next step."""
        while self._ended and self._write_end(self._ended[0]):
            self._ended.popleft()

    def write(self, trace: StepTrace) -> int:
        """Write the captured requests' rows of one step. Returns the number of rows written.

        Raises:
            ValueError: the verdict has fewer tokens than there are drafts, and would be read past its end.
        """
        if trace.sampled.shape[-1] <= max(trace.num_drafts, default=0):
            raise ValueError("fewer sampled tokens than drafts under verification")
        self._step = (self._step + 1) & 0x7FFFFFFF
        self.flush_ends()
        chosen = [i for i, name in enumerate(trace.request_ids) if self._is_capturing(name)]
        chosen = self._fit(trace, chosen)
        total = sum(trace.lengths[i] for i in chosen)
        if not total:
            return 0
        views = self.sink.reserve(total)
        if views is None:  # unreachable after _fit, because the consumer only frees room
            return 0
        self._fill(views, trace, self._known(trace, chosen))
        self.sink.commit()
        self.control.worker.rows_written += total
        return total

    # --- internals ---

    def _is_capturing(self, request_id: str) -> bool:
        request = self._open.get(request_id)
        return request is not None and not request.dropped

    def _fit(self, trace: StepTrace, chosen: list[int]) -> list[int]:
        """The requests that fit; others are dropped as a whole, the last in the batch (the youngest) first."""
        room = self.sink.free() - len(self._open)  # every open request will need its end row
        needed = sum(trace.lengths[i] for i in chosen)
        while chosen and needed > room:
            index = chosen.pop()
            needed -= trace.lengths[index]
            self._open[trace.request_ids[index]].dropped = True
            self.control.worker.requests_dropped += 1
        return chosen

    def _known(self, trace: StepTrace, chosen: list[int]) -> KnownRows:
        """What is known about every row before the verdict.

        A request's rows are made in one call, and reused for decode steps: between two steps each small call costs
        microseconds, because the target's weights have just evicted everything from the caches.
        """
        rows = array("i")
        for i in chosen:
            request, drafts = self._open[trace.request_ids[i]], trace.num_drafts[i]
            request.wrote = True
            before = trace.lengths[i] - 1 - drafts  # rows before the last certain token
            rows += request.rows(before, drafts, trace.emits[i])
        words = np.frombuffer(rows, dtype=np.int32).reshape(-1, META_WORDS)
        words[:, _STEP], words[:, _DRAFT_VERSION] = self._step, trace.draft_version
        requests = len(trace.request_ids)
        owners = np.repeat(np.arange(requests), trace.lengths)
        if len(chosen) == requests:
            return KnownRows(words, owners, None)
        is_chosen = np.zeros(requests, dtype=bool)
        is_chosen[chosen] = True
        taken = np.flatnonzero(is_chosen[owners])
        return KnownRows(words, owners[taken], taken)

    def _write_end(self, request: OpenRequest) -> bool:
        views = self.sink.reserve(1)
        if views is None:
            return False
        self.layout.meta(views[0])[0].copy_(upload(request.end_row(self._step), views[0].device))
        self.sink.commit()
        self.control.worker.rows_written += 1
        return True
