"""StepTrace: what one verification step showed, and how it becomes rows in the ring.

A runner adapter fills a StepTrace with the runner's own tensors; TraceWriter turns it into rows. Nothing here asks the
device for a value: lengths and draft counts are known to the host before the step runs, verdicts stay tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from aurora_vllm.transport.rows import META_WORDS, Field, RowFlag, RowLayout

if TYPE_CHECKING:
    from aurora_vllm.transport.control import ControlBlock


class RowSink(Protocol):
    """The producer's side of the ring (transport.ring.RingProducer)."""

    def free(self) -> int: ...
    def reserve(self, n: int) -> list[torch.Tensor] | None: ...
    def commit(self) -> None: ...


@dataclass
class StepTrace:
    """One engine step over a batch of R requests and N tokens, in batch order.

    A request's rows lie together; the last ``num_drafts[i]`` of them are the drafts under verification, and the row
    before those is the last token that was certain.
    """

    request_ids: Sequence[str]  # [R] vLLM's internal ids
    lengths: Sequence[int]  # [R] rows of each request in this step; they sum to N
    num_drafts: Sequence[int]  # [R]
    emits: Sequence[bool]  # [R] False inside a chunked prefill, where the sampled token is thrown away
    token_ids: torch.Tensor  # [N] integer
    positions: torch.Tensor  # [N] integer
    aux_hidden_states: Sequence[torch.Tensor]  # each [>=N, H], state entering an aux layer (vLLM SupportsEagle3)
    last_hidden_states: torch.Tensor  # [>=N, H] after the final norm: what lm_head reads
    sampled: torch.Tensor  # [R, >=1 + max(num_drafts)] accepted drafts and the token after them, then -1
    draft_version: int  # of the weights that proposed these drafts


@dataclass
class _OpenRequest:
    key: int  # the random number the learner knows the request by
    prompt_length: int
    temperature_milli: int
    dropped: bool = False


@dataclass
class TraceWriter:
    """Writes steps into the ring; drops whole requests, and counts them, when there is no room.

    Args:
        sink: producer side of the ring.
        layout: row layout shared with the learner.
        control: control block; the ``worker`` part is updated here.
        sample_rate: share of requests that are captured.
        seed: of the sampling and of the request numbers.
    """

    sink: RowSink
    layout: RowLayout
    control: ControlBlock
    sample_rate: float = 1.0
    seed: int | None = None
    _open: dict[str, _OpenRequest] = field(default_factory=dict)
    _ended: list[_OpenRequest] = field(default_factory=list)
    _step: int = 0

    def __post_init__(self) -> None:
        # Request numbers must not be guessable from one another, hence the operating system's randomness by default.
        self._random = random.Random(self.seed) if self.seed is not None else random.SystemRandom()

    def begin(self, request_id: str, prompt_length: int, temperature: float, may_learn: bool) -> None:
        """A request entered the batch. Known ones (resumed after preemption) keep their number."""
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
        self._open[request_id] = _OpenRequest(
            key=self._random.getrandbits(62), prompt_length=prompt_length, temperature_milli=round(temperature * 1000)
        )

    def end(self, request_id: str) -> None:
        """A request left: finished, aborted, or out of length."""
        request = self._open.pop(request_id, None)
        if request is not None:
            self._ended.append(request)

    def flush_ends(self) -> None:
        """Write the end rows that are due; those that find no room wait for the next step."""
        while self._ended and self._write_end(self._ended[0]):
            self._ended.pop(0)

    def write(self, trace: StepTrace) -> int:
        """Write the captured requests' rows of one step. Returns the number of rows written."""
        self._step = (self._step + 1) & 0x7FFFFFFF
        self.flush_ends()
        chosen = [i for i, name in enumerate(trace.request_ids) if self._is_capturing(name)]
        chosen = self._fit(trace, chosen)
        total = sum(trace.lengths[i] for i in chosen)
        if not total:
            return 0
        views = self.sink.reserve(total)
        if views is None:  # the consumer cannot take room away, so _fit makes this unreachable; stay safe anyway
            return 0
        row_index = self._row_index(trace, chosen)
        meta = self._meta(trace, chosen, row_index)
        start = 0
        for view in views:
            rows = slice(start, start + view.shape[0])
            self._fill(view, meta[rows], trace, row_index if row_index is None else row_index[rows], rows)
            start += view.shape[0]
        self.sink.commit()
        self.control.worker.rows_written += total
        return total

    # --- internals ---

    def _is_capturing(self, request_id: str) -> bool:
        request = self._open.get(request_id)
        return request is not None and not request.dropped

    def _fit(self, trace: StepTrace, chosen: list[int]) -> list[int]:
        """The requests that fit; the others are dropped whole, the last in the batch (the youngest) first."""
        room = self.sink.free() - len(self._open)  # every open request will need its end row
        needed = sum(trace.lengths[i] for i in chosen)
        while chosen and needed > room:
            index = chosen.pop()
            needed -= trace.lengths[index]
            self._open[trace.request_ids[index]].dropped = True
            self.control.worker.requests_dropped += 1
        return chosen

    @staticmethod
    def _row_index(trace: StepTrace, chosen: list[int]) -> torch.Tensor | None:
        """Rows to take from the batch, or None for the first rows in order (no gather needed). int64 [n]"""
        if len(chosen) == len(trace.request_ids):
            return None
        starts = [0]
        for length in trace.lengths:
            starts.append(starts[-1] + length)
        return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen]).to(trace.token_ids.device)

    def _meta(self, trace: StepTrace, chosen: list[int], row_index: torch.Tensor | None) -> torch.Tensor:
        """Metadata words of every row. int32 [n, 16], on the trace's device.

        What the host knows is laid out by numpy and sent in one piece: between two steps every small tensor operation
        costs tens of microseconds, because the target's weights have just swept the caches.
        """
        device = trace.token_ids.device
        known, lengths, certain = self._known_to_the_host(trace, chosen)
        owner = np.repeat(np.arange(len(chosen)), lengths)  # [n] row -> request
        offset = np.arange(len(owner)) - certain[owner]  # [n] 0 at the last certain token, 1 at the first draft
        words = known[owner]
        words[:, Field.DRAFT_INDEX] = np.maximum(offset - 1, -1)
        meta = torch.from_numpy(words).to(device, non_blocking=True)

        take = slice(len(owner)) if row_index is None else row_index
        meta[:, Field.POSITION] = trace.positions[take]
        meta[:, Field.TOKEN] = trace.token_ids[take]
        emits = np.array([trace.emits[i] for i in chosen])
        sampled = trace.sampled if row_index is None else trace.sampled[chosen]  # [R, >=1 + K]
        if not known[:, Field.NUM_DRAFTS].any():
            last = torch.from_numpy(certain[emits]).to(device, non_blocking=True)
            meta[last, Field.EMITTED] = sampled[emits, 0].int()
            return meta
        asked = (offset >= 0) & emits[owner]
        index = torch.from_numpy(np.stack([owner, np.clip(offset, 0, sampled.shape[1] - 1), offset, asked]))
        request, column, behind, answers = index.to(device, non_blocking=True)
        accepted = ((sampled >= 0).sum(1)[request] - 1).clamp(min=0).minimum(meta[:, Field.NUM_DRAFTS])
        rejected = behind > accepted
        meta[:, Field.NUM_ACCEPTED] = accepted
        meta[:, Field.FLAGS] = rejected * int(RowFlag.REJECTED)
        meta[:, Field.EMITTED] = torch.where((answers > 0) & ~rejected, sampled[request, column], -1)
        return meta

    def _known_to_the_host(self, trace: StepTrace, chosen: list[int]) -> tuple[np.ndarray, list[int], np.ndarray]:
        """A request's words, its rows in this step, and the row of its last certain token. [R, 16], [R], [R]"""
        lengths = [trace.lengths[i] for i in chosen]
        known = np.zeros((len(chosen), META_WORDS), dtype=np.int32)
        for words, i in zip(known, chosen, strict=True):
            request = self._open[trace.request_ids[i]]
            words[Field.REQUEST_LOW], words[Field.REQUEST_HIGH] = _split(request.key)
            words[Field.NUM_DRAFTS] = trace.num_drafts[i]
            words[Field.PROMPT_LENGTH] = request.prompt_length
            words[Field.TEMPERATURE_MILLI] = request.temperature_milli
        known[:, Field.STEP] = self._step
        known[:, Field.EMITTED] = -1
        known[:, Field.DRAFT_VERSION] = trace.draft_version
        return known, lengths, np.cumsum(lengths) - 1 - known[:, Field.NUM_DRAFTS]

    def _fill(
        self, view: torch.Tensor, meta: torch.Tensor, trace: StepTrace, row_index: torch.Tensor | None, rows: slice
    ) -> None:
        """Copy one reserved piece. view: uint8 [k, row_bytes], meta: int32 [k, 16]."""
        take = rows if row_index is None else row_index
        self.layout.meta(view).copy_(meta)
        states = [state[take] for state in (*trace.aux_hidden_states, trace.last_hidden_states)]
        torch.cat(states, dim=1, out=self.layout.states(view))

    def _write_end(self, request: _OpenRequest) -> bool:
        views = self.sink.reserve(1)
        if views is None:
            return False
        meta = self.layout.meta(views[0])
        meta.zero_()
        low, high = _split(request.key)
        flags = RowFlag.END | (RowFlag.DROPPED if request.dropped else RowFlag.NONE)
        words = {Field.REQUEST_LOW: low, Field.REQUEST_HIGH: high, Field.FLAGS: int(flags), Field.STEP: self._step}
        for word, value in words.items():
            meta[0, word] = value
        self.sink.commit()
        self.control.worker.rows_written += 1
        return True


def _split(key: int) -> tuple[int, int]:
    """A 62-bit number as two non-negative int32."""
    return key & 0x7FFFFFFF, key >> 31
