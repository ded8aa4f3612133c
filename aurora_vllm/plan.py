"""ServePlan: all that is decided about a run before anything starts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aurora_vllm.checkpoint import Draft, Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.gpu_plan import GpuPlan
from aurora_vllm.host_plan import HostPlan
from aurora_vllm.interop.aurora_yaml import AuroraFile
from aurora_vllm.learner.memory import MIB, LearnerMemory
from aurora_vllm.memory_plan import predict_learner
from aurora_vllm.preflight import SCHEDULER_CLASS, WORKER_CLASS
from aurora_vllm.spec_decode.copy_tables import MOST_TOKENS
from aurora_vllm.speculative_config import given_fields
from aurora_vllm.transport.bank import bank_bytes
from aurora_vllm.transport.ring import ring_bytes
from aurora_vllm.transport.rows import RowLayout

if TYPE_CHECKING:
    from aurora_vllm.spec_decode.compat import Probe
    from aurora_vllm.spec_decode.model_runner import ModelRunner

RING_MB = 256
MIN_RING_ROWS = 64  # with fewer, not even a short prompt fits, and every request would be dropped

# Where vLLM serves an EAGLE draft it computes the last block of a cached prefix again, because the draft's state in the
# block's last row depends on the token that followed then. That makes one row of the draft right, and on a CPU costs
# 128 tokens of every prompt that begins like another. vLLM 0.33 hashes the following token, too, and need not do it.
KEEP_LAST_BLOCK, HASHES_LOOK_AHEAD = "disable_eagle_block_drop", "disable_lookahead_block_hashes"


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """One run of the server. Sizes in bytes."""

    config: AuroraConfig
    vllm_version: str
    model_runner: ModelRunner
    probes: tuple[Probe, ...]
    target: Target
    draft: Draft
    copied_tokens: int  # the most that may be copied in place of a draft; 0: none are
    layout: RowLayout
    ring_rows: int
    ring_bytes: int
    bank_bytes: int
    learner: LearnerMemory  # at its peak, without the shared ring and bank
    aurora_file: AuroraFile | None = None
    gpu: GpuPlan | None = None  # None where the target runs on a CPU
    host: HostPlan | None = None  # None where it does not

    @property
    def fits(self) -> bool:
        """Whether every hook fits the installed vLLM; if not, vLLM is served plain."""
        return all(probe.ok for probe in self.probes)

    @property
    def shared_bytes(self) -> int:
        """Ring and bank; the control block's few pages are not counted."""
        return self.ring_bytes + self.bank_bytes

    @property
    def draft_kv_bytes(self) -> int:
        """Bytes of one token of the draft in vLLM's KV cache, if that has the target's dtype."""
        return self.draft.kv_width * self.layout.dtype.itemsize

    @property
    def target_kv_bytes(self) -> int | None:
        """Likewise of the target, all layers together; None where not every layer keeps keys and values."""
        width = self.target.kv_width
        return None if width is None else width * self.layout.dtype.itemsize


def make_plan(
    config: AuroraConfig,
    args: Namespace,
    vllm_version: str,
    target: Target,
    draft: Draft,
    model_runner: ModelRunner,
    probes: tuple[Probe, ...] = (),
    least_rows: int = 0,
) -> ServePlan:
    """Work out the sizes of a run.

    Args:
        args: vLLM's parsed arguments.
        least_rows: rows the ring has at least, unless the settings give its size.

    Raises:
        AuroraError: the ring is too small to be useful.
    """
    import torch

    layout = RowLayout(target.hidden_size, len(draft.aux_layers), getattr(torch, target.dtype))
    ring_mb = config.ring_mb or RING_MB
    rows = ring_mb * MIB // layout.row_bytes
    if config.ring_mb is None:
        rows = max(rows, least_rows)
    if rows < MIN_RING_ROWS:
        need = -(-MIN_RING_ROWS * layout.row_bytes // MIB)
        raise AuroraError(
            f"--aurora-ring-mb {ring_mb} holds {rows} rows of {layout.row_bytes} bytes",
            f"this model needs at least {need}, better {16 * need}",
        )
    if not config.learn:
        rows = MIN_RING_ROWS  # nobody writes or reads any
    return ServePlan(
        config=config,
        vllm_version=vllm_version,
        model_runner=model_runner,
        probes=probes,
        target=target,
        draft=draft,
        copied_tokens=most_copied(config, args, model_runner),
        layout=layout,
        ring_rows=rows,
        ring_bytes=ring_bytes(layout.row_bytes, rows),
        bank_bytes=bank_bytes(draft.specs),
        learner=predict_learner(config, target, draft),
    )


def most_copied(config: AuroraConfig, args: Namespace, model_runner: ModelRunner) -> int:
    """The most tokens that may be copied in place of a draft; 0 where copying is off."""
    if not config.prompt_lookup or config.speculate == "never":
        return 0
    if given_fields(args).get("draft_sample_method", "greedy") != "greedy":
        return 0  # spec_decode/scheduler.py says why
    most = config.prompt_lookup_tokens
    if model_runner.name == "V2":
        most = min(most, MOST_TOKENS)  # its kernels' limit
    if getattr(args, "enable_lora", False):
        # vLLM then reserves room in a step for that many proposed tokens of every request.
        most = min(most, config.num_speculative_tokens)
    return most


def apply(plan: ServePlan, args: Namespace, speculative_fields: Collection[str] = ()) -> None:
    """Change vLLM's parsed arguments to those of this plan; all others stay as they are.

    Args:
        speculative_fields: names of the fields of this vLLM's ``SpeculativeConfig``.
    """
    args.worker_cls = WORKER_CLASS
    args.scheduler_cls = SCHEDULER_CLASS
    most, copied = plan.config.num_speculative_tokens, plan.copied_tokens
    args.speculative_config = given_fields(args) | {
        "method": "eagle3",
        "model": str(plan.draft.directory),
        # vLLM understands this as the most proposed tokens it has to verify, copied ones among them.
        "num_speculative_tokens": max(most, copied),
    }
    if KEEP_LAST_BLOCK in speculative_fields and HASHES_LOOK_AHEAD not in speculative_fields:
        args.speculative_config.setdefault(KEEP_LAST_BLOCK, True)
    if (share := plan.gpu or plan.host) is not None:
        args.gpu_memory_utilization = share.utilization
    if plan.model_runner.name == "V2":
        # V2 captures CUDA graphs for the draft lengths in vLLM's table of K by batch size, and only for those. Our
        # scheduler keeps to these lengths. It does not look at the batch sizes in the table, so those are arbitrary.
        lengths = sorted({*range(most + 1), copied}, reverse=True)
        table = [[size, size, length] for size, length in enumerate(lengths, start=1)]
        args.speculative_config.setdefault("num_speculative_tokens_per_batch_size", table)
