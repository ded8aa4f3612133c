"""The control block: every field keeps its own value, texts are whole, counts per version add up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aurora_vllm.control.copy_counts import CountsLayout
from aurora_vllm.transport.acceptance import ROWS, VersionAcceptance
from aurora_vllm.transport.block import COPIES, POSITIONS, Bool, Float, Floats, Int, Ints, Text
from aurora_vllm.transport.control import BLOCKS, ControlBlock, WorkerBlock, control_bytes
from aurora_vllm.transport.segment import Segment
from tests.unit import transport_children as children


@pytest.fixture
def segment() -> Iterator[Segment]:
    with Segment.create("control", control_bytes()) as made:
        ControlBlock.create(made)
        yield made


VALUES: dict[type, st.SearchStrategy[Any]] = {
    Int: st.integers(-(2**63), 2**63 - 1),
    Bool: st.booleans(),
    Float: st.floats(allow_nan=False),
    Text: st.text(st.characters(min_codepoint=1, codec="utf-8"), max_size=2),  # 8 bytes, which fit into each
    Floats: st.lists(st.floats(allow_nan=False), min_size=8, max_size=8),
    Ints: st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda row: row + [0] * (512 - len(row))),
}


@settings(max_examples=25)
@given(data=st.data())
def test_every_field_keeps_its_own_value(data: st.DataObject) -> None:
    with Segment.create("control", control_bytes()) as segment:
        writer = ControlBlock.create(segment)
        values = {
            (block, name): data.draw(VALUES[type(field)])
            for block, kind in BLOCKS.items()
            for name, field in kind.fields.items()
        }
        order = data.draw(st.permutations(list(values)))
        for block, name in order:
            setattr(getattr(writer, block), name, values[block, name])
        reader = ControlBlock.attach(Segment.attach(segment.name))
        for (block, name), value in values.items():
            assert getattr(getattr(reader, block), name) == value, (block, name)
            assert type(getattr(getattr(reader, block), name)) is type(value)


@given(text=st.text(st.characters(min_codepoint=1, codec="utf-8"), max_size=300))
@example(text="ä" * 150)
@example(text="x" * 199 + "€")
@example(text="😀" * 51)
def test_a_text_is_cut_between_two_characters(text: str) -> None:
    with Segment.create("control", control_bytes()) as segment:
        control = ControlBlock.create(segment)
        control.worker.message = "something longer that was here before" * 5
        control.worker.message = text
        stored = control.worker.message
        assert text.startswith(stored)
        size = len(stored.encode())
        assert size <= 200
        assert stored == text or size + len(text[len(stored)].encode()) > 200


def test_texts_that_utf8_cannot_hold(segment: Segment) -> None:
    control = ControlBlock.attach(segment)
    control.worker.message = "a\0b\ud800"
    assert control.worker.message == "ab?"


def test_counting_up_and_plain_values(segment: Segment) -> None:
    control = ControlBlock.attach(segment)
    control.worker.swaps += 1
    control.worker.swaps += 1
    control.worker.capture_on = True
    control.learner.state = "training"
    control.learner.loss = float("nan")
    control.learner.shadow_accepted_per_position = [0.5, float("inf")]
    control.scheduler.record(3, 10, 30, 12, [8, 4, 0])
    snapshot = ControlBlock.attach(Segment.attach(segment.name)).snapshot()
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot
    assert {block: set(fields) for block, fields in snapshot.items()} == {
        block: set(kind.fields) | ({"acceptance", "acceptance_total"} if block == "scheduler" else set())
        for block, kind in BLOCKS.items()
    }
    assert snapshot["worker"]["swaps"] == 2
    assert snapshot["worker"]["capture_on"] is True
    assert snapshot["learner"]["state"] == "training"
    assert snapshot["learner"]["loss"] is None
    assert snapshot["learner"]["shadow_accepted_per_position"] == [0.5, None, 0, 0, 0, 0, 0, 0]
    assert snapshot["scheduler"]["acceptance"] == [
        {
            "version": 3,
            "num_drafts": 10,
            "num_draft_tokens": 30,
            "num_accepted": 12,
            "accepted_per_position": [8, 4, 0, 0, 0, 0, 0, 0],
            "mean_acceptance_length": 2.2,
        }
    ]


def test_what_the_worker_counts_fits(segment: Segment) -> None:
    control = ControlBlock.attach(segment)
    counts = list(range(CountsLayout(POSITIONS).size))
    control.worker.copy_counts = counts
    assert control.worker.copy_counts[: len(counts)] == counts
    with pytest.raises(ValueError, match="513 integers"):
        control.worker.copy_counts = [0] * 513


@pytest.mark.parametrize("name", BLOCKS)
def test_unknown_names_are_mistakes(segment: Segment, name: str) -> None:
    block = getattr(ControlBlock.attach(segment), name)
    with pytest.raises(AttributeError, match="no attribute 'swap'"):
        block.swap = 1
    with pytest.raises(AttributeError, match="no attribute 'swap'"):
        _ = block.swap


def test_heartbeat(segment: Segment) -> None:
    control = ControlBlock.attach(segment)
    before = time.monotonic_ns()
    control.learner.beat()
    assert before <= control.learner.heartbeat_ns <= time.monotonic_ns()
    assert control.worker.heartbeat_ns == 0


Counts = tuple[int, int, list[int]]


@settings(max_examples=60)
@given(
    records=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 5), st.lists(st.integers(0, 4), max_size=9)), max_size=150
    ),
    restart=st.integers(0, 150),
)
def test_acceptance_adds_up_per_version_and_forgets_the_one_idle_longest(
    records: list[tuple[int, int, list[int]]], restart: int
) -> None:
    model: dict[int, list[int]] = {}  # in the order of the last record
    total = [0] * 11
    with Segment.create("control", control_bytes()) as segment:
        control = ControlBlock.create(segment)
        for i, (version, drafts, accepted) in enumerate(records):
            if i == restart:
                control = ControlBlock.attach(segment)
            control.scheduler.record(version, drafts, 3 * drafts, sum(accepted[:8]), accepted)
            before = model.pop(version, [0] * 11)
            if len(model) == ROWS:
                del model[next(iter(model))]
            added = [drafts, 3 * drafts, sum(accepted[:8]), *(accepted + [0] * 8)[:8]]
            model[version] = [old + new for old, new in zip(before, added, strict=True)]
            total = [old + new for old, new in zip(total, added, strict=True)]
        rows = ControlBlock.attach(segment).scheduler.acceptance()
        assert [row.version for row in rows] == sorted(model)
        for row in [*rows, ControlBlock.attach(segment).scheduler._table.total()]:
            counts = [row.num_drafts, row.num_draft_tokens, row.num_accepted, *row.accepted_per_position]
            assert counts == (model[row.version] if row.version else total)


def test_a_version_that_came_back_is_not_the_oldest(segment: Segment) -> None:
    scheduler = ControlBlock.attach(segment).scheduler
    for version in [*range(1, ROWS + 1), 1, 100]:
        scheduler.record(version, 1, 3, 0, [])
    assert [row.version for row in scheduler.acceptance()] == [1, *range(3, ROWS + 1), 100]


def test_mean_acceptance_length_counts_the_bonus_token() -> None:
    assert VersionAcceptance(1, 4, 12, 6, (4, 2, 0)).mean_acceptance_length == 2.5
    assert VersionAcceptance(1, 0, 0, 0, ()).mean_acceptance_length == 1


def test_a_reader_beside_a_writing_process_sees_whole_texts(segment: Segment) -> None:
    control = ControlBlock.attach(segment)
    messages = ["a" * 200, "b" * 200, "ccc"]
    child = children.start(children.write_message, segment.name, messages, 0.5)
    seen: set[str] = set()
    while child.exitcode is None:
        seen.update(control.worker.message for _ in range(200))
    assert children.finish(child) == 0
    assert seen - {""} == set(messages)


def test_a_text_written_between_any_two_lines_of_a_read(segment: Segment) -> None:
    """However often the writer writes while a reader is in the middle, the reader gets one of its texts."""
    reader = ControlBlock.attach(segment)
    writer = ControlBlock.attach(Segment.attach(segment.name))
    texts = [letter * 200 for letter in "abcdefghijklmnopqrstuvwxyz"]
    for writes in range(1, 18):
        for at in range(1, 30):
            writer.worker.message = texts[0]

            def intrude(count: int = writes) -> None:
                for text in texts[1 : count + 1]:
                    writer.worker.message = text
                field = WorkerBlock.message
                copy = (writer.worker.ints[field.at // 8] + 1) % COPIES  # and it is half-way through the next one
                start = field.at + 8 + copy * field.width
                writer.worker.buf[start : start + 100] = b"#" * 100

            children.at_line(at, intrude)
            message = reader.worker.message
            children.at_line(0, intrude)
            assert message in texts[: writes + 1]


@settings(max_examples=25)
@given(kill_at=st.integers(1, 80))
def test_writer_of_a_text_killed_anywhere(kill_at: int) -> None:
    with Segment.create("control", control_bytes()) as segment:
        control = ControlBlock.create(segment)
        control.worker.message = "before"
        children.finish(children.start(children.write_message, segment.name, ["a" * 200, "b" * 100], 0.0, kill_at))
        assert control.worker.message in ("before", "a" * 200, "b" * 100)
        control.worker.message = "after"
        assert control.worker.message == "after"


@settings(max_examples=30)
@given(kill_at=st.integers(1, 300))
def test_scheduler_killed_anywhere_in_a_record(kill_at: int) -> None:
    with Segment.create("control", control_bytes()) as segment:
        control = ControlBlock.create(segment)
        killed = children.finish(children.start(children.record, segment.name, 8, kill_at)) == -9
        rows = control.scheduler.acceptance()
        assert killed or [row.version for row in rows] == [2, 3]
        for row in rows:  # whole records only; the one under way is left out
            n = row.num_drafts
            assert (row.num_draft_tokens, row.num_accepted) == (3 * n, 2 * n)
            assert row.accepted_per_position == (n, n, 0, 0, 0, 0, 0, 0)
        again = ControlBlock.attach(segment)
        for version in (2, 3, 4):
            again.scheduler.record(version, 1, 3, 2, [1, 1, 0])
        assert [row.version for row in control.scheduler.acceptance()] == [2, 3, 4]


def test_attach_refuses_a_segment_without_a_control_block() -> None:
    with Segment.create("test", control_bytes()) as segment, pytest.raises(ValueError, match="holds no control block"):
        ControlBlock.attach(segment)
    with Segment.create("test", 64) as segment:
        with pytest.raises(ValueError, match="holds no control block"):
            ControlBlock.attach(segment)
        with pytest.raises(ValueError, match="does not fit"):
            ControlBlock.create(segment)
