"""TraceWriter: the rows say exactly what the step was."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_vllm.spec_decode.trace import StepTrace, TraceWriter
from aurora_vllm.transport.rows import Field, RowFlag, RowLayout
from tests.unit import pretend_device
from tests.unit.pretend_device import Far

LAYOUT = RowLayout(hidden_size=4, num_aux=3, dtype=torch.float32)


class ListSink:
    """A ring of a given size whose rows stay; every reservation is split in two where it can be, as at a wrap."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[torch.Tensor] = []
        self._pending: list[torch.Tensor] = []

    def free(self) -> int:
        return self.capacity - sum(len(rows) for rows in self.rows)

    def reserve(self, n: int) -> list[torch.Tensor] | None:
        if n > self.free():
            return None
        sizes = [n] if n == 1 else [n // 2, n - n // 2]
        self._pending = [torch.full((size, LAYOUT.row_bytes), 255, dtype=torch.uint8) for size in sizes]
        return self._pending

    def commit(self) -> None:
        self.rows += self._pending
        self._pending = []

    def meta(self) -> torch.Tensor:
        return LAYOUT.meta(torch.cat(self.rows)) if self.rows else torch.zeros(0, 16, dtype=torch.int32)


def make_writer(capacity: int = 10_000, sample_rate: float = 1.0) -> tuple[TraceWriter, ListSink, SimpleNamespace]:
    sink = ListSink(capacity)
    names = ("requests_seen", "requests_captured", "requests_dropped", "requests_opted_out", "rows_written")
    worker = SimpleNamespace(**dict.fromkeys(names, 0))
    writer = TraceWriter(sink, LAYOUT, SimpleNamespace(worker=worker), sample_rate=sample_rate, seed=1)
    return writer, sink, worker


def make_step(
    lengths: list[int], drafts: list[int], accepted: list[int], emits: list[bool] | None = None, first_position: int = 0
) -> StepTrace:
    total, width = sum(lengths), 1 + max(drafts)
    sampled = torch.full((len(lengths), width), -1, dtype=torch.int32)
    for i, count in enumerate(accepted):
        sampled[i, : count + 1] = torch.arange(count + 1) + 100 * (i + 1)
    states = torch.arange(total * 4, dtype=torch.float32).reshape(total, 4)
    return StepTrace(
        request_ids=[f"r{i}" for i in range(len(lengths))],
        lengths=lengths,
        num_drafts=drafts,
        emits=emits or [True] * len(lengths),
        token_ids=torch.arange(total) + 7,
        positions=torch.cat([torch.arange(n) + first_position for n in lengths]),
        aux_hidden_states=[states + 1000 * k for k in (1, 2, 3)],
        last_hidden_states=states,
        sampled=sampled,
        draft_version=5,
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[bool], list[bool]]:
    count = draw(st.integers(1, 5))
    drafts = [draw(st.integers(0, 3)) for _ in range(count)]
    lengths = [d + draw(st.integers(1, 6)) for d in drafts]
    accepted = [draw(st.integers(0, d)) for d in drafts]
    emits = [draw(st.booleans()) or d > 0 for d in drafts]  # a chunked prefill carries no drafts
    captured = [draw(st.booleans()) for _ in range(count)]
    return lengths, drafts, accepted, emits, captured


@settings(max_examples=150)
@given(steps())
def test_rows_say_what_the_step_was(case: tuple[list[int], list[int], list[int], list[bool], list[bool]]) -> None:
    lengths, drafts, accepted, emits, captured = case
    writer, sink, worker = make_writer()
    for i, may_learn in enumerate(captured):
        writer.begin(f"r{i}", prompt_length=10 + i, temperature=0.5 * i, may_learn=may_learn)
    step = make_step(lengths, drafts, accepted, emits)
    written = writer.write(step)

    expected = []
    start = 0
    for i, length in enumerate(lengths):
        if captured[i]:
            certain = length - drafts[i] - 1  # index of the last certain token
            for row in range(length):
                offset = row - certain
                rejected = offset > accepted[i]
                emitted = 100 * (i + 1) + offset if offset >= 0 and not rejected and emits[i] else -1
                expected.append((start + row, i, row, max(offset - 1, -1), rejected, emitted))
        start += length
    assert written == len(expected) == worker.rows_written
    meta = sink.meta()
    assert len(meta) == len(expected)
    rows = torch.cat(sink.rows) if sink.rows else torch.zeros(0, LAYOUT.row_bytes, dtype=torch.uint8)
    for got, aux, last, (index, i, position, draft_index, rejected, emitted) in zip(
        meta, LAYOUT.aux(rows), LAYOUT.last(rows), expected, strict=True
    ):
        assert got[Field.TOKEN] == index + 7
        assert got[Field.POSITION] == position
        assert got[Field.DRAFT_INDEX] == draft_index
        assert bool(got[Field.FLAGS] & RowFlag.REJECTED) == rejected
        assert got[Field.EMITTED] == emitted
        assert got[Field.NUM_DRAFTS] == drafts[i]
        assert got[Field.PROMPT_LENGTH] == 10 + i
        assert got[Field.TEMPERATURE_MILLI] == 500 * i
        assert got[Field.DRAFT_VERSION] == 5
        assert torch.equal(last, step.last_hidden_states[index])
        assert torch.equal(aux, torch.cat([states[index] for states in step.aux_hidden_states]))


def test_token_0_is_a_token() -> None:
    writer, sink, _ = make_writer()
    writer.begin("r0", 2, 0.0, True)
    step = make_step([3], [2], [1])
    step.sampled[0] = torch.tensor([5, 0, -1])  # the first draft was right, and 0 is what follows it
    writer.write(step)
    assert sink.meta()[:, Field.EMITTED].tolist() == [5, 0, -1]
    assert sink.meta()[:, Field.FLAGS].tolist() == [0, 0, RowFlag.REJECTED]


def test_a_full_ring_drops_whole_requests_and_counts_them() -> None:
    writer, sink, worker = make_writer(capacity=14)
    for i in range(2):
        writer.begin(f"r{i}", 5, 0.0, True)
    assert writer.write(make_step([5, 5], [0, 0], [0, 0])) == 10
    assert writer.write(make_step([2, 2], [0, 0], [0, 0], first_position=5)) == 2  # room for one request and two ends
    assert worker.requests_dropped == 1
    for i in range(2):
        writer.end(f"r{i}")
    writer.flush_ends()
    ends = [row for row in sink.meta() if row[Field.FLAGS] & RowFlag.END]
    assert [bool(row[Field.FLAGS] & RowFlag.DROPPED) for row in ends] == [False, True]


def test_ends_that_find_no_room_wait_and_are_not_lost() -> None:
    writer, sink, _ = make_writer(capacity=2)
    writer.begin("r0", 5, 0.0, True)
    writer.write(make_step([1], [0], [0]))
    sink.capacity = 1
    writer.end("r0")
    writer.flush_ends()
    assert len(sink.meta()) == 1
    sink.capacity = 2
    writer.flush_ends()
    assert sink.meta()[1, Field.FLAGS] == RowFlag.END


def test_a_ring_that_nobody_reads_leaves_nothing_waiting() -> None:
    writer, sink, worker = make_writer(capacity=60)
    for _i in range(200):
        writer.begin("r0", prompt_length=3, temperature=0.0, may_learn=True)
        writer.write(make_step([4], [3], [1]))
        writer.end("r0")
        assert len(writer._ended) <= sink.capacity
    writer.flush_ends()
    assert len(writer._ended) <= 1 and worker.requests_dropped > 150  # those it has rows of, that found no room


def test_opted_out_and_unsampled_requests_leave_no_row() -> None:
    writer, sink, worker = make_writer(sample_rate=0.0)
    writer.begin("r0", 5, 0.0, False)
    writer.begin("r1", 5, 0.0, True)
    assert writer.write(make_step([3, 3], [0, 0], [0, 0])) == 0
    writer.end("r0")
    writer.end("r1")
    writer.flush_ends()
    assert not sink.rows
    assert (worker.requests_seen, worker.requests_opted_out, worker.requests_captured) == (2, 1, 0)


def test_nobody_can_guess_the_number_of_a_request_from_those_of_others() -> None:
    """A generator of random's own can be predicted from 624 of its words."""
    writer = TraceWriter(ListSink(9), LAYOUT, SimpleNamespace(worker=None))
    assert isinstance(writer._random, random.SystemRandom)


def test_a_resumed_request_keeps_its_number() -> None:
    writer, sink, worker = make_writer()
    writer.begin("r0", 5, 0.0, True)
    writer.write(make_step([3], [0], [0]))
    writer.begin("r0", 5, 0.0, True)
    writer.write(make_step([3], [0], [0]))
    keys = sink.meta()[:, [Field.REQUEST_LOW, Field.REQUEST_HIGH]]
    assert len(keys.unique(dim=0)) == 1
    assert worker.requests_seen == 1


def test_on_a_device_no_copy_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is not captured, one has ended; rows, verdicts and ring lie on the device."""
    dispatch, waits, crossed = pretend_device._dispatch, [], []

    def watching(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if (name := func.overloadpacket.__name__) in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            target = isinstance(args[0], Far) if name == "copy_" else kwargs.get("device") == pretend_device.DEVICE
            if isinstance(source, Far) != target and (name == "copy_" or kwargs.get("device") is not None):
                crossed.append(str(func))
                if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                    waits.append(str(func))
        return dispatch(func, args, kwargs)

    monkeypatch.setattr(pretend_device, "_dispatch", watching)
    writer, sink, _ = make_writer()
    for i in range(3):
        writer.begin(f"r{i}", prompt_length=3, temperature=0.0, may_learn=i != 1)
    writer.begin("gone", prompt_length=3, temperature=0.0, may_learn=True)
    writer.end("gone")
    step = make_step([4, 4, 6], [3, 3, 0], [1, 2, 0])
    expected, at_home, _ = make_writer()
    expected._open, expected._ended = dict(writer._open), list(writer._ended)
    expected.write(step)
    with pretend_device.pretend_device(monkeypatch) as device:
        reserve = sink.reserve

        def reserve_there(n: int) -> list[torch.Tensor] | None:
            sink._pending = [view.to(device, non_blocking=True) for view in reserve(n) or ()]
            return sink._pending

        monkeypatch.setattr(sink, "reserve", reserve_there)
        there = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(step).items()
            if isinstance(value, torch.Tensor)
        }
        aux = [state.to(device, non_blocking=True) for state in step.aux_hidden_states]
        crossed.clear()
        writer.write(replace(step, **there, aux_hidden_states=aux))
        found = torch.cat([rows.here for rows in sink.rows])  # type: ignore[attr-defined]
    assert len(crossed) > 3 and not waits
    assert torch.equal(found, torch.cat(at_home.rows))


def test_a_verdict_on_fewer_tokens_than_there_are_drafts_is_refused() -> None:
    """Whoever fills the rows would read the next request's, or past the end."""
    writer, sink, _ = make_writer()
    step = make_step([4, 4], [3, 3], [1, 1])
    step.sampled = step.sampled[:, :3]
    for name in step.request_ids:
        writer.begin(name, prompt_length=3, temperature=0.0, may_learn=True)
    with pytest.raises(ValueError, match="fewer sampled tokens than drafts"):
        writer.write(step)
    assert not sink.rows
