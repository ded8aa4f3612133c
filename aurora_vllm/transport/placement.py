"""Where the ring's rows and the bank's weights of a session lie; decided once, by the worker.

1. The server lays out ring and bank in POSIX shared memory before vLLM starts, in full size, so that there is always
   something to fall back to.
2. The worker acts once vLLM has measured the GPU, taken its KV cache and captured its graphs (:func:`place`). If the
   target's device can share memory, the worker allocates two pieces there, has another process open them for a trial,
   lays out ring and bank over them, writes their names into its part of the control block, and gives back the room in
   POSIX shared memory. If any of this fails, it lays out ring and bank as they were, frees what it made, and logs one
   warning. Then it lends the learner the target's embedding and lm_head (:func:`lend_target_head`).
3. The learner starts after that (:func:`join`). It opens what the control block names and trains on that device; where
   nothing is named, on the CPU. It makes no memory itself: killed and started again, it opens the same memory and goes
   on at its own counter.

The worker owns the memory, because only the owner may hand rows over (:mod:`.cuda`), and because without the worker
there is nothing to share: if it dies the server ends, the driver frees the memory, and the learner's next wait raises
``OwnerGone``. The pages that describe the memory are removed with the server's or, after a kill, by the next server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aurora_vllm.errors import AuroraError, first_line
from aurora_vllm.transport.bank import WeightBank, bank_bytes, weights_bytes
from aurora_vllm.transport.bank_slot import CRC_CHUNK
from aurora_vllm.transport.control import WorkerBlock
from aurora_vllm.transport.memory import NamedMemory, memory_for
from aurora_vllm.transport.probe import try_elsewhere
from aurora_vllm.transport.ring import HEADER_BYTES, RingConsumer, RingProducer
from aurora_vllm.transport.segment import Segment

logger = logging.getLogger("vllm.aurora")

CPU = torch.device("cpu")


def place(
    ring: Segment, bank: Segment, device: torch.device, worker: WorkerBlock, wanted: bool
) -> tuple[RingProducer, WeightBank]:
    """The worker's sides of ring and bank. May take seconds, so it is called before anything is served.

    Args:
        ring, bank: as the server laid them out, with nothing written or published yet.
        device: the target's.
        worker: the worker's part of the control block, where the place is written.
        wanted: whether to use device memory where possible.
    """
    producer, weights = RingProducer.attach(ring), WeightBank.attach(bank)
    where = memory_for(device) if wanted else None
    if where is None:
        return producer, weights
    row_bytes, capacity, specs = producer.row_bytes, producer.capacity, weights.specs
    made: list[NamedMemory] = []
    try:
        for kind, size in {"ring_memory": row_bytes * capacity, "bank_memory": weights_bytes(specs)}.items():
            made.append(where.create(kind, size, device))
        made[1].crc32(0, min(CRC_CHUNK, len(made[1].bytes)), 0)  # so that its buffer is allocated now
        try_elsewhere(device, [one.name for one in made])
        producer = RingProducer.create(ring, row_bytes, capacity, made[0])
        weights = WeightBank.create(bank, specs, made[1])
        worker.ring_memory, worker.bank_memory = (one.name for one in made)
        worker.memory_device = str(device)  # last: it makes the learner open the others
    except Exception as error:  # serving does not depend on any of this
        # Laid out again: they may refer to the memory that is freed now.
        producer, weights = RingProducer.create(ring, row_bytes, capacity), WeightBank.create(bank, specs)
        for one in made:
            one.release()
        logger.warning(
            "aurora: memory of %s cannot be shared (%s): ring and bank stay in POSIX shared memory, a captured step "
            "waits for its copy to the host, and the learner runs on the CPU",
            device,
            _in_one_line(error),
        )
        return producer, weights
    ring.give_back(HEADER_BYTES)
    bank.give_back(bank_bytes(specs, weights_elsewhere=True))
    return producer, weights


@dataclass(frozen=True)
class HeadTensors:
    """The target's embedding and lm_head as vLLM holds them: [at least V, H], contiguous (vLLM pads a vocabulary); one
    tensor where they are tied. As lent: uint8, flat."""

    embedding: torch.Tensor
    lm_head: torch.Tensor


def lend_target_head(find: Callable[[], HeadTensors | None], worker: WorkerBlock) -> None:
    """Let the learner read the target's embedding and lm_head where they lie, so that it needs no copies, which would
    take gigabytes of a GPU. Where they cannot be lent, one line in the log says so, and the learner makes copies.

    Args:
        find: returns the two matrices, or None where the target has none of that kind.
        worker: the worker's part of the control block, after :func:`place`.
    """
    where = memory_for(torch.device(worker.memory_device)) if worker.memory_device else None
    made: list[NamedMemory] = []
    try:
        head = find() if where is not None else None
        if head is None or where is None:
            return
        made.append(where.lend("embedding_memory", head.embedding))
        tied = head.lm_head is head.embedding
        made.append(made[0] if tied else where.lend("lm_head_memory", head.lm_head))
        try_elsewhere(head.embedding.device, [one.name for one in made])
        for one in made:
            one.hand_over()
    except Exception as error:  # of the driver, of torch, of an unknown model
        for one in made:
            one.release()
        why = _in_one_line(error)
        logger.warning("aurora: the learner takes a copy of the target's embedding and lm_head (%s)", why)
        return
    worker.embedding_memory, worker.lm_head_memory = (one.name for one in made)


@dataclass(frozen=True)
class Joined:
    """The learner's sides of ring and bank."""

    ring: RingConsumer
    bank: WeightBank
    device: torch.device  # where they lie, and where to train
    head: HeadTensors | None = None  # the target's, lent


def join(ring: Segment, bank: Segment, worker: WorkerBlock) -> Joined:
    """Open ring and bank where the worker placed them.

    Raises:
        AuroraError: they cannot be opened, so there is nothing to learn from.
    """
    named = worker.memory_device
    where = memory_for(torch.device(named)) if named else None
    if where is None:
        return Joined(RingConsumer.attach(ring), WeightBank.attach(bank), CPU)
    lent = dict.fromkeys(filter(None, (worker.embedding_memory, worker.lm_head_memory)))  # one name where tied
    try:
        rows, weights, *matrices = [where.open(name) for name in (worker.ring_memory, worker.bank_memory, *lent)]
    except Exception as error:  # of the driver, of the system, of torch
        why = _in_one_line(error)
        raise AuroraError(f"the learner cannot open the ring and the bank on {named} ({why})") from error
    for one in matrices:
        one.take_over()
    head = HeadTensors(matrices[0].bytes, matrices[-1].bytes) if matrices else None
    return Joined(RingConsumer.attach(ring, rows), WeightBank.attach(bank, weights), rows.device, head)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
