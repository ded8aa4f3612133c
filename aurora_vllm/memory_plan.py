"""What a run takes of the host's or a GPU's memory: sizes from its settings and from vLLM's arguments.

The formulas are in learner/memory.py; what vLLM is told as a consequence, in gpu_plan.py and host_plan.py.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING

from aurora_vllm.checkpoint import Draft, Target, target_head_bytes
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from aurora_vllm.gpu_plan import GpuPlan
from aurora_vllm.host_plan import HostPlan
from aurora_vllm.learner.memory import MIB, DraftSizes, LearnerMemory, predict, predict_gpu
from aurora_vllm.spec_decode.copy_tables import device_bytes
from aurora_vllm.transport.bank_layout import weights_bytes
from aurora_vllm.transport.ring import HEADER_BYTES
from aurora_vllm.transport.rows import LARGEST_STEP

if TYPE_CHECKING:
    from aurora_vllm.plan import ServePlan

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch's names of one variable
CPU_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's, in GiB
MOST_REQUESTS = 1024  # vLLM's max_num_seqs on a GPU of 70 GB or more, where nobody sets it


def predict_learner(config: AuroraConfig, target: Target, draft: Draft) -> LearnerMemory:
    """The learner's peak, with a full replay buffer and the longest trajectory in a batch."""
    import torch

    from aurora_vllm.learner.train import fast_matmul_dtype

    return predict(
        _draft_sizes(target, draft),
        target_head_bytes(target),
        config.replay_mb * MIB,
        _most_rows(config, target),
        config.ttt_length,
        fast_matmul_dtype(torch.device("cpu")) == torch.bfloat16,
    )


def least_rows_on_gpu(args: Namespace) -> int:
    """Rows of a ring that has room for two of vLLM's largest steps."""
    return 2 * _largest_step(args)


def plan_gpu(plan: ServePlan, args: Namespace, total: int) -> GpuPlan:
    """What this plan takes on a GPU of ``total`` bytes, and what is left to vLLM."""
    config, target, draft = plan.config, plan.target, plan.draft
    memory = predict_gpu(
        _draft_sizes(target, draft),
        target_bytes=0 if _lends_target_head(args) else target_head_bytes(target),
        rows=_most_rows(config, target),
        ttt_length=config.ttt_length,
        ring_bytes=plan.ring_bytes - HEADER_BYTES,
        weights_bytes=weights_bytes(draft.specs),
        copies_bytes=_copies_bytes(plan, args),
        logits_bytes=_logits_bytes(plan, args),
    )
    refused = "there is no learner" if not config.learn else ""
    if config.learner_device == "cpu":
        refused = refused or "learner_device is cpu"
    given = getattr(args, "kv_cache_memory_bytes", None) is not None
    return GpuPlan(total, float(args.gpu_memory_utilization), memory, given, refused)


def plan_host(plan: ServePlan, args: Namespace, total: int) -> HostPlan:
    """What this plan takes of a host's ``total`` bytes where vLLM serves from its CPU, and what is left to vLLM.

    Raises:
        AuroraError: it takes more than there is.
    """
    ours = plan.shared_bytes + (plan.learner.total if plan.config.learn else 0)
    if ours >= total:
        raise AuroraError(
            f"ring, bank and learner want {ours / MIB:.0f} MiB, and the host has {total / MIB:.0f}",
            "the learner's largest part is --aurora-replay-mb",
        )
    given = getattr(args, "kv_cache_memory_bytes", None) is not None or bool(os.environ.get(CPU_KV_CACHE))
    return HostPlan(total, float(args.gpu_memory_utilization), ours, given)


def _copies_bytes(plan: ServePlan, args: Namespace) -> int:
    return device_bytes(_most_requests(args), plan.config.prompt_lookup_answers) if plan.copied_tokens else 0


def _logits_bytes(plan: ServePlan, args: Namespace) -> int:
    """Proposals leave half of a step to those who wait (``SpeculationAdvisor``); the target's logits of all that is
    verified lie side by side."""
    config, requests = plan.config, _most_requests(args)
    tokens = 0 if config.speculate == "never" else max(config.num_speculative_tokens, plan.copied_tokens)
    unmeasured = max(0, min(requests * (1 + tokens), _largest_step(args) // 2) - requests)
    return unmeasured * plan.target.vocab_size * plan.layout.dtype.itemsize


def _largest_step(args: Namespace) -> int:
    return getattr(args, "max_num_batched_tokens", None) or LARGEST_STEP


def _most_requests(args: Namespace) -> int:
    return getattr(args, "max_num_seqs", None) or MOST_REQUESTS


def _lends_target_head(args: Namespace) -> bool:
    """Whether the worker can let the learner read the target's embedding and lm_head (placement.py): not where torch or
    vLLM allocate by mapping, which CUDA IPC does not share."""
    mapped = any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR_SETTINGS)
    flags = ("enable_sleep_mode", "enable_cumem_allocator")
    return not mapped and not any(getattr(args, flag, False) for flag in flags)


def _draft_sizes(target: Target, draft: Draft) -> DraftSizes:
    shapes = {spec.name: spec.shape for spec in draft.specs}
    return DraftSizes.of(shapes, draft.num_parameters, target.hidden_size, draft.embedding)


def _most_rows(config: AuroraConfig, target: Target) -> int:
    longest = min(config.max_trajectory_tokens, target.max_model_len or config.max_trajectory_tokens)
    return max(config.batch_tokens, longest)
