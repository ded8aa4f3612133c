"""The control block: what the processes tell each other and the status route.

Four blocks, each written by exactly one process and read by all::

    control.worker.swaps += 1
    control.learner.message = "training"
    control.snapshot()  # plain Python values

One process, and for each field one thread of it: ``+=`` is a read and a write. Names of all fields are in
:data:`BLOCKS`.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from aurora_vllm.transport.acceptance import TABLE_BYTES, AcceptanceTable, VersionAcceptance
from aurora_vllm.transport.block import (
    ANSWER,
    BOOL,
    COUNTS,
    FLOAT,
    FLOATS,
    INT,
    REQUEST,
    STATE,
    TEXT,
    Block,
    Kind,
    block_bytes,
)
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.segment import Segment

MAGIC = int.from_bytes(b"AURORACT", "little")
HEADER_BYTES = 64

# Times ending in _ns are time.monotonic_ns(): one clock for all processes of a machine, which nobody sets.
BLOCKS: dict[str, dict[str, Kind]] = {
    "server": {
        "learner_pid": INT,
        "learner_restarts": INT,
        "update_request": REQUEST,  # transport/update_request.py
    },
    "worker": {
        "pid": INT,
        "heartbeat_ns": INT,
        "attached": BOOL,
        "message": TEXT,
        "memory_device": TEXT,  # where ring and bank lie; empty in POSIX shared memory: transport/placement.py
        "ring_memory": TEXT,  # names of what lies there
        "bank_memory": TEXT,
        "embedding_memory": TEXT,  # names of the target's own, lent to the learner; empty: it has copies
        "lm_head_memory": TEXT,
        "capture_on": BOOL,
        "capture_errors": INT,
        "step": INT,
        "proposed_step": INT,  # the newest step in which the draft was asked: else what vLLM hands over are zeros
        "rows_written": INT,
        "requests_seen": INT,
        "requests_captured": INT,
        "requests_dropped": INT,
        "requests_opted_out": INT,
        "staged_version": INT,  # checked and packed: the next step runs it
        "live_version": INT,
        "previous_version": INT,
        "live_lineage": INT,  # of the live version: transport/bank.py, Publication
        "copies_on_device": BOOL,  # proposals are replaced by copies in the worker: spec_decode/device_copies.py
        "copy_counts": COUNTS,  # control/copy_counts.py
        "copy_counts_taken": INT,  # how often; when it changes, the counts have
        "swaps": INT,
        "refusals": INT,
        "refusal": TEXT,
        "last_swap_ns": INT,
        "last_swap_stall_us": FLOAT,
        "rollbacks": INT,
        "rolled_back_version": INT,  # the last one; never live again
        "rollback": TEXT,
    },
    "scheduler": {
        "draft_length": INT,
        "reason": TEXT,
        "draft_sits_out": BOOL,  # the draft need not run over prompts: nobody is likely to draft from them
        "steps": INT,
        "in_flight": INT,  # steps under way: with a long prompt one takes seconds
        "generated_tokens": INT,
        "spec_steps": INT,
        "copying": TEXT,  # "on", or why nothing is copied
        "preferred_copies": INT,  # a bit for each kind that goes before the draft's tokens, where the worker copies
        "copied_drafts": INT,  # verifications of copied drafts; the acceptance table has the draft's own
        "copied_tokens": INT,
        "copied_accepted": INT,
        "learner_share": FLOAT,  # factor on the share the learner may take: control/earnings.py times control/guard.py
        "learner_earnings": TEXT,  # in words, what it may take by what speculation gains
        "learner_slowdown": FLOAT,  # what it adds to the time per output token, as a share of it
        "learner_guard": TEXT,
        "probation_version": INT,  # the newest that drafted
        "probation_drafts": INT,
        "probation_evidence": FLOAT,  # that it is worse: control/rollout.py
        "probation": TEXT,
        "roll_back_version": INT,  # the worker is to undo this one; "probation" says why
    },
    "learner": {
        "pid": INT,
        "heartbeat_ns": INT,
        "state": STATE,
        "working": BOOL,  # in a burst of work: 0 while it sleeps off its share of the CPU, or waits
        "message": TEXT,
        "step": INT,  # of the optimizer, those of resumed checkpoints included
        "steps_taken": INT,  # by this server's learners; only ever grows
        "trajectories": INT,
        "trajectories_discarded": INT,
        "tokens_seen": INT,
        "tokens_trained": INT,
        "replay_bytes": INT,
        "replay_tokens": INT,
        "replay_trajectories": INT,
        "loss": FLOAT,
        "cpu_seconds": FLOAT,
        "published_version": INT,
        "publishes": INT,
        "shadow_version": INT,
        "shadow_steps": INT,
        "shadow_accepted_per_position": FLOATS,
        "candidate_acceptance_length": FLOAT,
        "incumbent_acceptance_length": FLOAT,
        "vocabulary_coverage": FLOAT,
        "vocabulary_changes": INT,
        "asleep": BOOL,
        "sleep": TEXT,  # why it sleeps, why it woke, or what its trial is at
        "sleeps": INT,
        "trial_gain": FLOAT,  # acceptance length won by training, control/drift.py
        "update_answer": ANSWER,
        "checkpoints": INT,
        "checkpoint_failures": INT,
        "checkpoint": TEXT,  # the newest, what was resumed, or why none was saved
    },
}


class SchedulerBlock(Block):
    """The scheduler's block: its fields, and what was accepted of each draft version."""

    __slots__ = ("_table",)

    def __init__(self, buf: memoryview, fields: dict[str, Kind], table: memoryview) -> None:
        super().__init__(buf, fields)
        object.__setattr__(self, "_table", AcceptanceTable(table))

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


class ControlBlock:
    """Use :meth:`create` or :meth:`attach`."""

    server: Block
    worker: Block
    scheduler: SchedulerBlock
    learner: Block

    def __init__(self, segment: Segment) -> None:
        words = segment.buf[:HEADER_BYTES].cast("q") if segment.size >= control_bytes() else None
        if words is None or words[0] != MAGIC or words[1] != _fingerprint():
            raise ValueError(f"segment {segment.name} holds no control block of this version")
        at = HEADER_BYTES
        for name, fields in BLOCKS.items():
            size = block_bytes(fields)
            if name == "scheduler":
                table = segment.buf[at + size : at + size + TABLE_BYTES]
                self.scheduler = SchedulerBlock(segment.buf[at : at + size], fields, table)
                size += TABLE_BYTES
            else:
                setattr(self, name, Block(segment.buf[at : at + size], fields))
            at += size

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
    return HEADER_BYTES + sum(map(block_bytes, BLOCKS.values())) + TABLE_BYTES


def _fingerprint() -> int:
    layout = {
        block: {name: (kind.name, kind.width) for name, kind in fields.items()} for block, fields in BLOCKS.items()
    }
    return zlib.crc32(json.dumps([layout, TABLE_BYTES]).encode())
