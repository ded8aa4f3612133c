"""The ring: first in first out, nothing torn, nothing invented, nobody waits; and kill -9 of either side."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aurora_vllm.transport.ring import RingConsumer, RingGauge, RingProducer, ring_bytes
from aurora_vllm.transport.rows import RowLayout
from aurora_vllm.transport.segment import Segment
from tests.unit import transport_children as children

ROW = 192
processes = settings(max_examples=12)


def make(capacity: int, row_bytes: int = ROW) -> Segment:
    segment = Segment.create("ring", ring_bytes(row_bytes, capacity))
    RingProducer.create(segment, row_bytes, capacity)
    return segment


def check_rows(rows: torch.Tensor, first: int) -> int:
    """Every byte of every row is as row first, first + 1, … was written; the index after the last."""
    for offset, row in enumerate(rows):
        assert torch.equal(row, children.pattern(first + offset, rows.shape[1])), f"row {first + offset}"
    return first + len(rows)


class RingMachine(RuleBasedStateMachine):
    """One process plays both sides against a deque."""

    @initialize(capacity=st.integers(1, 7))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.segment = make(capacity)
        self.producer, self.consumer = RingProducer.attach(self.segment), RingConsumer.attach(self.segment)
        self.gauge = RingGauge.attach(self.segment)
        self.model: deque[int] = deque()
        self.written = 0

    @rule(n=st.integers(0, 8), commit=st.booleans())
    def write(self, n: int, commit: bool) -> None:
        fits = n <= self.capacity - len(self.model)
        views = self.producer.reserve(n)
        assert (views is not None) == fits
        if views is None:
            self.producer.commit()  # nothing is reserved: nothing happens
            return
        assert sum(map(len, views)) == n
        assert len(views) <= 2
        for i, row in enumerate(row for view in views for row in view):
            row.copy_(children.pattern(self.written + i, ROW) if commit else torch.full((ROW,), 255, dtype=torch.uint8))
        if commit:
            self.producer.commit()
            self.model.extend(range(self.written, self.written + n))
            self.written += n

    @rule(max_rows=st.integers(0, 8))
    def read(self, max_rows: int) -> None:
        rows = self.consumer.read(max_rows)
        expected = [self.model.popleft() for _ in range(min(max_rows, len(self.model)))]
        assert rows.shape == (len(expected), ROW)
        for row, index in zip(rows, expected, strict=True):
            assert torch.equal(row, children.pattern(index, ROW))

    @rule()
    def restart_producer(self) -> None:
        self.producer.reserve(self.producer.free())  # lost with the old one
        self.producer = RingProducer.attach(Segment.attach(self.segment.name))

    @rule()
    def restart_consumer(self) -> None:
        self.consumer = RingConsumer.attach(Segment.attach(self.segment.name))

    @invariant()
    def counts(self) -> None:
        used = len(self.model)
        assert (self.consumer.available(), self.producer.free()) == (used, self.capacity - used)
        assert (self.gauge.used, self.gauge.capacity) == (used, self.capacity)
        assert self.producer.written == self.gauge.written == self.written

    def teardown(self) -> None:
        if hasattr(self, "segment"):
            self.segment.unlink()


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=30)


@processes
@given(
    capacity=st.integers(4, 9),
    batches=st.lists(st.integers(1, 4), min_size=1, max_size=120),
    reads=st.lists(st.integers(1, 9), min_size=1, max_size=9),
)
def test_two_processes(capacity: int, batches: list[int], reads: list[int]) -> None:
    with make(capacity) as segment:
        producer = children.start(children.produce, segment.name, batches)
        consumer, index, turn = RingConsumer.attach(segment), 0, 0
        deadline = time.monotonic() + 30
        while index < sum(batches) and time.monotonic() < deadline:
            index = check_rows(consumer.read(reads[turn % len(reads)]), index)
            turn += 1
        assert children.finish(producer) == 0
        assert index == sum(batches)
        assert consumer.available() == 0


def test_full_ring_with_a_dead_consumer_never_makes_the_producer_wait() -> None:
    with make(4) as segment:
        producer = RingProducer.attach(segment)
        assert children.write_rows(producer, 4)
        started = time.monotonic()
        assert all(producer.reserve(1) is None for _ in range(1000))
        assert time.monotonic() - started < 1
        assert producer.free() == 0
        assert producer.reserve(0) == []
        assert check_rows(RingConsumer.attach(segment).read(9), 0) == 4


@processes
@given(kill_at=st.integers(1, 700), batches=st.lists(st.integers(1, 4), min_size=10, max_size=10))
def test_producer_killed_anywhere(kill_at: int, batches: list[int]) -> None:
    with make(64) as segment:
        killed = children.finish(children.start(children.produce, segment.name, batches, kill_at)) == -9
        consumer = RingConsumer.attach(segment)
        ends = [sum(batches[:i]) for i in range(len(batches) + 1)]
        index = check_rows(consumer.read(consumer.available()), 0)
        assert index in ends  # whole commits only
        assert killed or index == ends[-1]
        again = RingProducer.attach(segment)
        assert again.written == index
        assert children.write_rows(again, 3)
        assert check_rows(consumer.read(9), index) == index + 3


@processes
@given(kill_at=st.integers(1, 500), batches=st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_consumer_killed_anywhere(kill_at: int, batches: list[int]) -> None:
    with make(64) as segment:
        producer = RingProducer.attach(segment)
        assert children.write_rows(producer, 60)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = children.start(children.consume, segment.name, batches, send, kill_at)
        send.close()
        children.finish(child)
        seen = 0
        while receive.poll():
            try:
                first, count = receive.recv()
            except EOFError:
                break
            assert first == seen
            seen += count
        consumer = RingConsumer.attach(segment)
        rows = consumer.read(64)
        lost = 60 - len(rows) - seen
        assert 0 <= lost <= 4  # at most the read that was under way
        assert check_rows(rows, 60 - len(rows)) == 60
        assert children.write_rows(producer, 64)


@pytest.mark.parametrize("after", [0.0, 0.004, 0.011, 0.023])
def test_producer_killed_from_outside_while_it_writes(after: float) -> None:
    with make(8) as segment:
        consumer, index = RingConsumer.attach(segment), 0
        child = children.start(children.produce_for_ever, segment.name)
        while index < 20:
            index = check_rows(consumer.read(8), index)
        end = time.monotonic() + after
        while time.monotonic() < end:
            index = check_rows(consumer.read(8), index)
        child.kill()
        child.join()
        index = check_rows(consumer.read(8), index)
        producer = RingProducer.attach(segment)
        assert producer.written == index
        assert children.write_rows(producer, 5)
        check_rows(consumer.read(8), index)


def test_consumer_killed_from_outside_while_it_reads() -> None:
    with make(8) as segment:
        producer = RingProducer.attach(segment)
        receive, send = multiprocessing.Pipe(duplex=False)
        child = children.start(children.consume_for_ever, segment.name, send)
        send.close()
        seen = 0
        while seen < 200:
            children.write_rows(producer, 2)
            while receive.poll():
                first, count = receive.recv()
                assert first == seen
                seen += count
        child.kill()
        child.join()
        try:
            while receive.poll():
                first, count = receive.recv()
                seen += count
        except (EOFError, OSError):  # the report under way when it died
            pass
        consumer = RingConsumer.attach(segment)
        rows = consumer.read(8)
        first = producer.written - len(rows)
        assert 0 <= first - seen <= 3 * 8
        check_rows(rows, first)


def test_real_rows_can_be_written_through_the_views() -> None:
    layout = RowLayout(hidden_size=16, num_aux=3, dtype=torch.bfloat16)
    with make(5, layout.row_bytes) as segment:
        producer, consumer = RingProducer.attach(segment), RingConsumer.attach(segment)
        for step in range(4):  # 3 rows a step in 5: it wraps inside a step
            views = producer.reserve(3)
            assert views is not None
            for view in views:
                layout.meta(view).fill_(step)
                layout.aux(view).fill_(step + 0.5)
                layout.last(view).fill_(-step)
            producer.commit()
            rows = consumer.read(9)
            assert (layout.meta(rows) == step).all()
            assert (layout.aux(rows) == step + 0.5).all()
            assert (layout.last(rows) == -step).all()
            assert rows.shape == (3, layout.row_bytes)


def test_what_is_read_is_a_private_copy() -> None:
    with make(2) as segment:
        producer, consumer = RingProducer.attach(segment), RingConsumer.attach(segment)
        children.write_rows(producer, 2)
        rows = consumer.read(2)
        children.write_rows(producer, 2)
        check_rows(rows, 0)


@pytest.mark.parametrize(("row_bytes", "capacity"), [(0, 4), (100, 4), (64, 0), (-64, 4)])
def test_sizes_that_make_no_ring(row_bytes: int, capacity: int) -> None:
    with pytest.raises(ValueError, match="a ring needs rows"):
        ring_bytes(row_bytes, capacity)


def test_attach_refuses_a_segment_without_a_ring() -> None:
    with Segment.create("test", 8192) as segment:
        for side in (RingProducer, RingConsumer, RingGauge):
            with pytest.raises(ValueError, match="holds no ring"):
                side.attach(segment)
        with pytest.raises(ValueError, match="do not fit"):
            RingProducer.create(segment, 64, 1000)
    with Segment.create("test", 16) as segment, pytest.raises(ValueError, match="holds no ring"):
        RingConsumer.attach(segment)


def test_a_negative_count_is_a_mistake() -> None:
    with make(4) as segment, pytest.raises(ValueError, match="cannot reserve"):
        RingProducer.attach(segment).reserve(-1)
