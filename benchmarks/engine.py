"""A real vLLM engine with aurora attached but no learner, for benchmarks and integration tests.

The caller takes the learner's place: it reads the ring and publishes into the bank. Engine core, scheduler and worker
run in the caller's process, where they can be inspected.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import bank_specs, load_draft
from aurora_vllm.plan import KEEP_LAST_BLOCK
from aurora_vllm.session import ENVIRONMENT_KEY, Session
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.copying import DraftCopier
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingConsumer, RingProducer, ring_bytes
from aurora_vllm.transport.rows import RowLayout
from aurora_vllm.transport.segment import Segment

AUX_LAYERS = (2, 15, 27)
RING_ROWS = 20_000
# For benchmarks: sizes as of a server. The defaults of Engine.start are small on purpose, for tests.
SERVER: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 256 << 20}


def small_arguments(target: Path, draft: Path) -> dict[str, Any]:
    """vllm.LLM's arguments for tests: a small engine with three draft tokens. None of them is aurora's."""
    return {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "block_size": 32,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 32 << 20,
        "seed": 0,
        "speculative_config": {
            "method": "eagle3",
            "model": str(draft),
            "num_speculative_tokens": 3,
            KEEP_LAST_BLOCK: True,  # as in a server
        },
    }


@contextmanager
def humaneval_engine(eager: bool) -> Iterator[tuple[Engine, list[str]]]:
    """The demo's model in an engine of a server's sizes, and one prompt for each HumanEval problem."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from demo.model import ensure_model
    from demo.workload import humaneval

    with TemporaryDirectory() as scratch:
        engine = Engine.start(ensure_model(), Path(scratch), enforce_eager=eager, **SERVER)
        try:
            yield engine, [wordings[0].text for wordings in humaneval()]
        finally:
            engine.close()


@dataclass
class Engine:
    """vLLM's LLM with an aurora session around it."""

    llm: Any
    session: Session
    segments: list[Segment]
    control: ControlBlock
    ring: RingConsumer
    bank: WeightBank

    @classmethod
    def start(
        cls,
        target: Path,
        directory: Path,
        speculate: Literal["auto", "always", "never"] = "always",
        draft_vocab_size: int = 4096,
        speculative: Mapping[str, Any] | None = None,
        **vllm_arguments: Any,
    ) -> Engine:
        """Make a day-0 draft and the shared memory, and start vLLM.

        Args:
            target: directory of the model.
            directory: scratch space for the draft.
            speculate: as in AuroraConfig.
            draft_vocab_size: of the day-0 draft.
            speculative: entries of vLLM's speculative_config that override those set here.
            vllm_arguments: arguments of vllm.LLM that override ``small_arguments``.
        """
        draft = make_day0_draft(target, directory / "draft", draft_vocab_size)
        hidden_size = json.loads((target / "config.json").read_text())["hidden_size"]
        layout = RowLayout(hidden_size, 3, torch.float32)
        specs = bank_specs(load_draft(draft), torch.float32)
        control_segment = Segment.create("control", control_bytes())
        ring_segment = Segment.create("ring", ring_bytes(layout.row_bytes, RING_ROWS))
        bank_segment = Segment.create("bank", bank_bytes(specs))
        control = ControlBlock.create(control_segment)
        RingProducer.create(ring_segment, layout.row_bytes, RING_ROWS)
        bank = WeightBank.create(bank_segment, specs)
        session = Session(
            config=AuroraConfig(speculate=speculate, prompt_lookup=False),  # the draft is measured
            target=target,
            draft=draft,
            hidden_size=hidden_size,
            num_aux=3,
            dtype="float32",
            ring=ring_segment.name,
            bank=bank_segment.name,
            control=control_segment.name,
        )
        session.export()
        # On a CPU vLLM 0.32 saves ahead-of-time artefacts that it cannot load again; its older compile cache works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine core and scheduler in this process

        from vllm import LLM

        arguments = small_arguments(target, draft) | {
            "disable_log_stats": False,
            "worker_cls": "aurora_vllm.spec_decode.worker.AuroraWorker",
            "scheduler_cls": "aurora_vllm.spec_decode.scheduler.AuroraScheduler",
        }
        arguments["speculative_config"] |= speculative or {}
        llm = LLM(**(arguments | vllm_arguments))
        return cls(
            llm,
            session,
            [control_segment, ring_segment, bank_segment],
            control,
            RingConsumer.attach(ring_segment),
            bank,
        )

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call function(engine, ...) in the engine's process: here the caller's, in some tests another one."""
        return function(self, *args, **kwargs)

    def generate(self, prompts: Sequence[Any], **sampling: Any) -> list[Any]:
        """vLLM's RequestOutputs for token ids or texts, in order. Greedy, unless ``sampling`` says otherwise."""
        from vllm import SamplingParams

        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 32, "ignore_eos": True} | sampling))
        given = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        return self.llm.generate(given, params, use_tqdm=False)

    def let_requests_end(self) -> None:
        """Generate one token of an extra request: only the next step tells the worker which requests have ended."""
        self.generate([[1]], max_tokens=1, extra_args={"aurora_learn": False})

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker; in the tests that is an InspectableWorker."""
        return self.llm.collective_rpc(method, args=args)[0]

    @property
    def scheduler(self) -> Any:
        """The AuroraScheduler, in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def worker(self) -> Any:
        """vLLM's worker."""
        return self.llm.llm_engine.model_executor.driver_worker.worker

    @property
    def attachment(self) -> Attachment:
        """What aurora attached to the worker."""
        found: Attachment = self.worker._aurora
        return found

    @contextmanager
    def draft_length(self, mode: str) -> Iterator[None]:
        """Fix K for a block of code: "never" is 0, "always" is 3."""
        before = self.run(Engine.choose_draft_length, mode)
        try:
            yield
        finally:
            self.run(Engine.choose_draft_length, before)

    @contextmanager
    def copying(self) -> Iterator[DraftCopier]:
        """Replace drafts by copies for a block of code, as a server does. Otherwise only the draft proposes."""
        proposals = self.scheduler._advisor._proposals
        proposals._copier = copier = DraftCopier(self.scheduler.num_spec_tokens)
        try:
            yield copier
        finally:
            proposals._copier = None

    def choose_draft_length(self, mode: str) -> str:
        """As ``draft_length``, but permanently. Returns the mode before."""
        controller = self.scheduler._advisor._controller
        before, controller.mode = controller.mode, mode
        return str(before)

    def drain(self) -> torch.Tensor:
        """All rows that are in the ring now. uint8 [n, row_bytes]"""
        return self.ring.read(RING_ROWS)

    def spec_decode_counters(self) -> dict[str, Any]:
        """vLLM's counters vllm:spec_decode_num_*, by name without this prefix."""
        prefix = "vllm:spec_decode_num_"
        found = {}
        for metric in self.llm.get_metrics():
            if metric.name.startswith(prefix):
                value = getattr(metric, "value", None)
                found[metric.name.removeprefix(prefix)] = metric.values if value is None else value
        return found

    def wait_for(self, condition: Any, seconds: float = 10.0) -> None:
        """Poll until the condition holds, while the engine makes no steps; the worker's threads run all the same."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not hold in time"
            time.sleep(0.02)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        os.environ.pop(ENVIRONMENT_KEY, None)
        for segment in self.segments:
            segment.unlink()
