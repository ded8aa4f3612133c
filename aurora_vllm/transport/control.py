"""The control block: fields by which the processes inform each other and the status route.

Four blocks, each written by exactly one process and read by all::

    control.worker.swaps += 1
    control.learner.message = "training"
    control.snapshot()  # plain Python values

Each field is written by one thread of that process, because ``+=`` is a read and a write. Times ending in _ns are
time.monotonic_ns(): a clock that all processes of a machine share, and that is never adjusted.
"""

from __future__ import annotations

import json
import time
import zlib
from typing import Any

from aurora_vllm.transport.acceptance import TABLE_BYTES, AcceptanceTable, VersionAcceptance
from aurora_vllm.transport.block import Block, Bool, Float, Floats, Int, Ints, Text
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORACT", "little")
HEADER_BYTES = 64


class ProcessBlock(Block):
    """Fields of a process with a heartbeat."""

    __slots__ = ()

    pid = Int()
    heartbeat_ns = Int()

    def beat(self) -> None:
        """Set heartbeat_ns to now."""
        self.heartbeat_ns = time.monotonic_ns()


class ServerBlock(Block):
    """Written by the server (the API process)."""

    __slots__ = ()

    learner_pid = Int()
    learner_restarts = Int()
    update_request = Text(4128)  # transport/update_request.py


class WorkerBlock(ProcessBlock):
    """Written by vLLM's worker."""

    __slots__ = ()

    attached = Bool()
    message = Text()
    model_runner = Text(8)  # "V1" or "V2", as found: vLLM may have chosen another one than planned
    memory_device = Text()  # where ring and bank lie; empty: POSIX shared memory (transport/placement.py)
    ring_memory = Text()  # names of the memory there
    bank_memory = Text()
    embedding_memory = Text()  # names of the target's matrices lent to the learner; empty: it has copies
    lm_head_memory = Text()
    capture_on = Bool()
    capture_errors = Int()
    step = Int()
    proposed_step = Int()  # the newest step that asked for drafts; in others vLLM hands over zeros
    rows_written = Int()
    requests_seen = Int()
    requests_captured = Int()
    requests_dropped = Int()
    requests_opted_out = Int()
    staged_version = Int()  # checked and packed; the next step runs it
    live_version = Int()
    previous_version = Int()
    live_lineage = Int()  # of the live version (transport/bank.py, Publication)
    copies_on_device = Bool()  # the worker replaces proposals by copies (spec_decode/device_copies.py)
    copy_counts = Ints(512)  # control/copy_counts.py
    copy_counts_taken = Int()  # how often copy_counts was written
    swaps = Int()
    refusals = Int()
    refusal = Text()
    last_swap_ns = Int()
    last_swap_stall_us = Float()
    rollbacks = Int()
    rolled_back_version = Int()  # the last one; it never becomes live again
    rollback = Text()


class SchedulerBlock(Block):
    """Written by vLLM's scheduler: fields, and the acceptance of each draft version."""

    __slots__ = ("_table",)

    draft_length = Int()
    reason = Text()
    draft_sits_out = Bool()  # the draft need not run over prompts, because drafting is unlikely to start soon
    steps = Int()
    in_flight = Int()  # steps under way; one with a long prompt takes seconds
    generated_tokens = Int()
    spec_steps = Int()
    copying = Text()  # "on", or why nothing is copied
    preferred_copies = Int()  # where the worker copies: a bit for each kind that is preferred to the draft's tokens
    copied_drafts = Int()  # verifications of copies; those of drafts are in the acceptance table
    copied_tokens = Int()
    copied_accepted = Int()
    learner_share = Float()  # factor on the share the learner may take: control/earnings.py times control/guard.py
    learner_earnings = Text()  # in words, the share that speculation's gain allows
    learner_slowdown = Float()  # what learning adds to the time per output token, as a share of it
    learner_guard = Text()
    probation_version = Int()  # the newest version that drafted
    probation_drafts = Int()
    probation_evidence = Float()  # that this version is worse (control/rollout.py)
    probation = Text()
    roll_back_version = Int()  # the worker is to roll this one back; "probation" says why

    def __init__(self, buf: memoryview) -> None:
        super().__init__(buf)
        self._table = AcceptanceTable(self.buf[super().size() :])

    @classmethod
    def size(cls) -> int:
        return super().size() + TABLE_BYTES

    def record(
        self, version: int, num_drafts: int, draft_tokens: int, accepted: int, accepted_per_position: list[int]
    ) -> None:
        """Add to the counts of a version; see :meth:`AcceptanceTable.record`."""
        self._table.record(version, num_drafts, draft_tokens, accepted, accepted_per_position)

    def acceptance(self) -> list[VersionAcceptance]:
        """Counts of the last 64 versions, in ascending order of version."""
        return self._table.rows()

    def snapshot(self) -> dict[str, Any]:
        rows = [row.as_dict() for row in self.acceptance()]
        return super().snapshot() | {"acceptance": rows, "acceptance_total": self._table.total().as_dict()}


class LearnerBlock(ProcessBlock):
    """Written by the learner."""

    __slots__ = ()

    state = Text(32)
    working = Bool()  # in a burst of work; false while it rests to keep to its share, or waits
    message = Text()
    step = Int()  # optimizer steps, those of a resumed checkpoint included
    steps_taken = Int()  # optimizer steps of this server's learners; only ever grows
    trajectories = Int()
    trajectories_discarded = Int()
    tokens_seen = Int()
    tokens_trained = Int()
    replay_bytes = Int()
    replay_tokens = Int()
    replay_trajectories = Int()
    loss = Float()
    cpu_seconds = Float()
    published_version = Int()
    publishes = Int()
    shadow_version = Int()
    shadow_steps = Int()
    shadow_accepted_per_position = Floats()
    candidate_acceptance_length = Float()
    incumbent_acceptance_length = Float()
    vocabulary_coverage = Float()
    vocabulary_changes = Int()
    asleep = Bool()
    sleep = Text()  # why it sleeps or woke, or how far its trial is
    sleeps = Int()
    trial_gain = Float()  # acceptance length won by training (control/drift.py)
    update_answer = Text(1024)
    checkpoints = Int()
    checkpoint_failures = Int()
    checkpoint = Text()  # the newest one, the resumed one, or why none was saved


BLOCKS: dict[str, type[Block]] = {
    "server": ServerBlock,
    "worker": WorkerBlock,
    "scheduler": SchedulerBlock,
    "learner": LearnerBlock,
}


class ControlBlock:
    """Use :meth:`create` or :meth:`attach`."""

    server: ServerBlock
    worker: WorkerBlock
    scheduler: SchedulerBlock
    learner: LearnerBlock

    def __init__(self, segment: Segment) -> None:
        words = segment.buf[:HEADER_BYTES].cast("q") if segment.size >= control_bytes() else None
        if words is None or words[0] != MAGIC or words[1] != _fingerprint():
            raise ValueError(f"segment {segment.name} holds no control block of this version")
        at = HEADER_BYTES
        for name, block in BLOCKS.items():
            setattr(self, name, block(segment.buf[at:]))
            at += block.size()

    @classmethod
    def create(cls, segment: Segment) -> ControlBlock:
        """Lay out a zeroed control block in a fresh segment of at least :func:`control_bytes` bytes.

        Raises:
            ValueError: the segment is too small.
        """
        if segment.size < control_bytes():
            raise ValueError(f"a control block of {control_bytes()} bytes does not fit into {segment.size} bytes")
        words = segment.buf[:HEADER_BYTES].cast("q")
        words[1] = _fingerprint()
        fence()
        words[0] = MAGIC
        return cls(segment)

    @classmethod
    def attach(cls, segment: Segment) -> ControlBlock:
        """Raises ValueError where the segment holds no control block with these fields."""
        return cls(segment)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Every block's fields, for the status route; the scheduler's with its acceptance table."""
        return {name: getattr(self, name).snapshot() for name in BLOCKS}


def control_bytes() -> int:
    """Size of the segment that holds a control block."""
    return HEADER_BYTES + sum(block.size() for block in BLOCKS.values())


def _fingerprint() -> int:
    layout = {
        name: [(field, type(kind).__name__, kind.width) for field, kind in block.fields.items()]
        for name, block in BLOCKS.items()
    }
    return zlib.crc32(json.dumps([layout, TABLE_BYTES]).encode())
