"""What a run owns besides vLLM: three shared-memory segments and the learner."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from pathlib import Path
from types import TracebackType

from aurora_vllm import stopping
from aurora_vllm.errors import AuroraError
from aurora_vllm.plan import ServePlan
from aurora_vllm.provenance import without_secrets
from aurora_vllm.session import Session
from aurora_vllm.supervisor import HANG_CPU_S, HANG_S, SAVE_S, STOP_S, Supervisor
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer
from aurora_vllm.transport.segment import SHM, NoSharedMemory, Segment, own_prefix, sweep

# Set by the endpoint plugin (aurora_vllm.server.routes), which vLLM calls in this process once the engine is up.
engine_is_up = threading.Event()


class Runtime:
    """Segments, session and supervised learner of one run; a context manager that leaves nothing behind."""

    def __init__(self, plan: ServePlan, told_when_up: bool) -> None:
        """
        Args:
            told_when_up: vLLM will load our endpoint plugin in this process, which sets ``engine_is_up``; if not, the
                learner starts once the worker has attached.

        Raises:
            AuroraError: there is no room in shared memory.
        """
        self._owner, self._prefix = os.getpid(), own_prefix()
        self._supervisor: Supervisor | None = None
        self._control: ControlBlock | None = None
        atexit.register(self.close)
        stopping.cleanups.append(self.close)
        sweep()
        try:
            sizes = {"ring": plan.ring_bytes, "bank": plan.bank_bytes, "control": control_bytes()}
            # Kept as an attribute: the lock that marks them as in use is held as long as they are mapped here.
            self._segments = ring, bank, block = tuple(Segment.create(kind, size) for kind, size in sizes.items())
        except NoSharedMemory as error:
            self.close()
            raise AuroraError(str(error), "the ring is what --aurora-ring-mb says") from None
        RingProducer.create(ring, plan.layout.row_bytes, plan.ring_rows)
        WeightBank.create(bank, plan.draft.specs)
        control = self._control = ControlBlock.create(block)
        self.session = Session(
            config=plan.config,
            target=plan.target.directory,
            draft=plan.draft.directory,
            hidden_size=plan.target.hidden_size,
            num_aux=len(plan.draft.aux_layers),
            dtype=plan.target.dtype,
            ring=ring.name,
            bank=bank.name,
            control=block.name,
            on_device=plan.gpu is not None and plan.gpu.used,
            learner_gpu_bytes=plan.gpu.memory.learner if plan.gpu is not None and plan.gpu.used else 0,
            resume=plan.draft.directory if plan.draft.origin == "resumed" else None,
            model=str(plan.target.directory) if Path(plan.target.model).is_dir() else plan.target.model,
            command=without_secrets(sys.argv),
            vllm_version=plan.vllm_version,
        )
        self.session.export()
        if plan.config.learn:
            ready = engine_is_up.is_set if told_when_up else (lambda: control.worker.attached)
            stop_s = SAVE_S if plan.config.checkpoint_dir else STOP_S
            self._supervisor = Supervisor(
                control.server,
                ready,
                plan.config.learner_threads,
                plan.config.learner_nice,
                stop_s=stop_s,
                heartbeat=lambda: control.learner.heartbeat_ns,
                hang_s=HANG_S,
                hang_cpu_s=HANG_CPU_S,
            )
            self._supervisor.start()
            # At the signal, not after vLLM: the learner reads the target's memory, which ends with the engine.
            stopping.at_once.append(self._supervisor.stop)

    def close(self) -> None:
        """End the learner, then remove the segments. Idempotent."""
        if os.getpid() != self._owner:  # a forked child runs atexit handlers, too, and must not clean up for its parent
            return
        if self._supervisor is not None:
            self._supervisor.stop()
        # By name, not from a list: a signal may come after a segment is made and before it is entered in a list.
        for path in SHM.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)
        if self._control is not None:  # what the worker made: transport/placement.py
            worker = self._control.worker
            made = worker.ring_memory, worker.bank_memory, worker.embedding_memory, worker.lm_head_memory
            for name in filter(None, made):
                (SHM / name).unlink(missing_ok=True)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
