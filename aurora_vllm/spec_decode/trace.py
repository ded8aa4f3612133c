"""StepTrace: what one verification step showed, and how it becomes rows in the ring.

A runner adapter fills a StepTrace with the runner's own tensors; TraceWriter turns it into rows. Nothing here asks the
device for a value: lengths and draft counts are known to the host before the step runs, verdicts stay tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

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
        """Metadata words of every row. int32 [n, 16], on the trace's device."""
        device = trace.token_ids.device
        lengths = [trace.lengths[i] for i in chosen]
        total = sum(lengths)
        known = torch.tensor(self._words_known_to_the_host(trace, chosen), dtype=torch.int32)  # [R, 7]
        owner = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(lengths), output_size=total)
        known, owner = known.to(device, non_blocking=True), owner.to(device, non_blocking=True)
        low, high, drafts, prompt, temperature, emits, base = known[owner].unbind(1)  # each [n]
        offset = torch.arange(total, dtype=torch.int32, device=device) - base  # 0 at the last certain token

        sampled = trace.sampled if row_index is None else trace.sampled[chosen]  # [R, >=1 + K]
        accepted = (sampled >= 0).sum(1, dtype=torch.int32)[owner] - 1
        accepted = torch.minimum(accepted.clamp(min=0), drafts)
        rejected = offset > accepted
        column = offset.clamp(0, sampled.shape[1] - 1).long()
        emitted = torch.where((offset >= 0) & ~rejected & (emits > 0), sampled[owner, column].int(), -1)

        take = slice(total) if row_index is None else row_index
        meta = torch.zeros(total, META_WORDS, dtype=torch.int32, device=device)
        meta[:, Field.REQUEST_LOW] = low
        meta[:, Field.REQUEST_HIGH] = high
        meta[:, Field.FLAGS] = rejected.int() * int(RowFlag.REJECTED)
        meta[:, Field.POSITION] = trace.positions[take].int()
        meta[:, Field.TOKEN] = trace.token_ids[take].int()
        meta[:, Field.STEP] = self._step
        meta[:, Field.DRAFT_INDEX] = (offset - 1).clamp(min=-1)
        meta[:, Field.NUM_DRAFTS] = drafts
        meta[:, Field.NUM_ACCEPTED] = accepted
        meta[:, Field.EMITTED] = emitted
        meta[:, Field.DRAFT_VERSION] = trace.draft_version
        meta[:, Field.PROMPT_LENGTH] = prompt
        meta[:, Field.TEMPERATURE_MILLI] = temperature
        return meta

    def _words_known_to_the_host(self, trace: StepTrace, chosen: list[int]) -> list[list[int]]:
        """Per request: key (two words), drafts, prompt length, temperature, emits, row of its last certain token."""
        words = []
        end = 0
        for i in chosen:
            request = self._open[trace.request_ids[i]]
            end += trace.lengths[i]
            drafts = trace.num_drafts[i]
            words.append(
                [
                    *_split(request.key),
                    drafts,
                    request.prompt_length,
                    request.temperature_milli,
                    int(trace.emits[i]),
                    end - 1 - drafts,
                ]
            )
        return words

    def _fill(
        self, view: torch.Tensor, meta: torch.Tensor, trace: StepTrace, row_index: torch.Tensor | None, rows: slice
    ) -> None:
        """Copy one reserved piece. view: uint8 [k, row_bytes], meta: int32 [k, 16]."""
        take = rows if row_index is None else row_index
        self.layout.meta(view).copy_(meta)
        width = self.layout.hidden_size
        aux = self.layout.aux(view)
        for i, states in enumerate(trace.aux_hidden_states):
            aux[:, i * width : (i + 1) * width].copy_(states[take], non_blocking=True)
        self.layout.last(view).copy_(trace.last_hidden_states[take], non_blocking=True)

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
