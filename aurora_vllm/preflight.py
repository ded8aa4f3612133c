"""Checks before the model is loaded: each fault is one line and exit code 2, and nothing is left behind."""

from __future__ import annotations

import importlib
import os
import socket
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_vllm.config import AuroraConfig, flag_of
from aurora_vllm.config_json import read_text_config
from aurora_vllm.errors import PLAIN, AuroraError
from aurora_vllm.learner.memory import MIB
from aurora_vllm.transport.segment import SHM, free_bytes, sweep

if TYPE_CHECKING:
    from aurora_vllm.plan import ServePlan

WORKER_CLASS = "aurora_vllm.spec_decode.worker.AuroraWorker"
SCHEDULER_CLASS = "aurora_vllm.spec_decode.scheduler.AuroraScheduler"

# vLLM's argument -> the values that Aurora supports, its default first. One engine and one worker, for now.
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "nnodes": (1,),
    "data_parallel_rank": (None,),
    "data_parallel_start_rank": (None,),
    "data_parallel_external_lb": (False,),
    "data_parallel_hybrid_lb": (False,),
    "data_parallel_multi_port_external_lb": (False,),
    "enable_dbo": (False,),  # V2 cannot speculate with it: vLLM would fall back to V1, which is not planned for
    "headless": (False,),
    "distributed_executor_backend": (None, "uni", "mp"),  # a worker gets its session from the environment
    "grpc": (False,),
    "logits_processors": (None, []),  # vLLM takes none where it speculates, and would end
    "worker_cls": ("auto", WORKER_CLASS),
    "scheduler_cls": (None, SCHEDULER_CLASS),
    # The learner reads the target's embedding and lm_head from the files vLLM reads them from.
    "load_format": ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
}


def check_supported(args: Namespace, config: AuroraConfig) -> None:
    """Refuse what Aurora does not support yet, or cannot do on this machine.

    Raises:
        AuroraError: names the flag.
    """
    cpus = len(os.sched_getaffinity(0))
    if config.learner_threads > cpus:  # OpenMP would start that many, and starve the server
        raise AuroraError(f"{flag_of('learner_threads')}: there are {cpus} CPUs for it, not {config.learner_threads}")
    for name, values in SUPPORTED.items():
        value = getattr(args, name, values[0])  # another vLLM may not have this argument
        if value not in values:
            flag = "--" + name.replace("_", "-")
            said = flag if isinstance(value, bool) else f"{flag} {value}"
            raise AuroraError(f"Aurora does not support {said} yet", PLAIN)
    api_servers = getattr(args, "api_server_count", None)
    if api_servers is not None and (api_servers < 1 or (api_servers > 1 and config.sglang_api)):
        beside = " beside --aurora-sglang-api, which is one server's" if api_servers > 1 else ""
        raise AuroraError(f"Aurora does not support --api-server-count {api_servers}{beside}", PLAIN)
    if plugins := [point.name for point in entry_points(group="vllm.logits_processors")]:
        raise AuroraError(
            f"vLLM leaves installed logits processors out where it speculates ({', '.join(plugins)})", PLAIN
        )
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise AuroraError("Aurora does not support VLLM_USE_RUST_FRONTEND yet", PLAIN)


def gpu_total_bytes() -> int | None:
    """Memory of the GPU that vLLM will use, asked of vLLM, which makes no CUDA context for it; None without CUDA."""
    platform = importlib.import_module("vllm.platforms").current_platform
    return int(platform.get_device_total_memory()) if platform.is_cuda() else None


def check_kv_cache(plan: ServePlan, args: Namespace) -> None:
    """See that a KV cache of a given size has room for the longest request, the draft's part included. vLLM checks it,
    too, but only after it has loaded the model.

    Raises:
        AuroraError: it has room for the target's part only.
    """
    given, longest, target = (
        getattr(args, "kv_cache_memory_bytes", None),
        plan.target.max_model_len,
        plan.target_kv_bytes,
    )
    if given is None or longest is None or target is None or getattr(args, "kv_cache_dtype", "auto") != "auto":
        return
    if getattr(args, "max_model_len", None) == -1 or _forgets(read_text_config(plan.target.directory)):
        return  # vLLM shortens the longest request until it fits, or needs less than this
    if longest * target <= given < (needed := longest * (target + plan.draft_kv_bytes)):
        raise AuroraError(
            f"--kv-cache-memory-bytes {given}: a request of {longest} tokens takes {needed} with the draft's part",
            f"give more, or a smaller --max-model-len; {PLAIN}",
        )


def _forgets(config: Mapping[str, Any]) -> bool:
    """Whether some layer's attention has a bounded window."""
    kinds = set(config.get("layer_types") or ())
    return bool(config.get("sliding_window")) or bool(kinds - {"full_attention"})


def host_total_bytes() -> int | None:
    """Memory of which a vLLM on a CPU takes its share, asked of vLLM; None on other platforms, and where this vLLM has
    no such function."""
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        return None
    try:
        resources = importlib.import_module("vllm.utils.cpu_resource_utils")
        return int(resources.get_memory_node_info(resources.get_visible_memory_node()[0]).total_memory)
    except (ImportError, AttributeError, LookupError, OSError):
        return None


def check_port(args: Namespace) -> None:
    """See that the address is free before minutes go into loading a model.

    Raises:
        AuroraError: it is taken, or cannot be bound.
    """
    if getattr(args, "uds", None):
        if Path(args.uds).exists():
            raise AuroraError(f"{args.uds} exists already", "stop the server that uses it or remove it")
        return
    host, port = args.host or "", args.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's own socket
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AuroraError(
            f"cannot listen on {host or '0.0.0.0'}:{port}: {reason}", "choose another with --port"
        ) from None


def check_shared_memory(wanted: int) -> None:
    """See that there is room for ring and bank, before a model is downloaded and a draft is made.

    Args:
        wanted: bytes.

    Raises:
        AuroraError: there is not enough room.
    """
    sweep()  # what a killed server left behind
    free = free_bytes()
    if free is not None and free < wanted:
        raise AuroraError(
            f"ring and bank want {wanted / MIB:.0f} MiB of shared memory, and {SHM} has {free / MIB:.0f} free",
            "give it more room (docker run --shm-size), or ask for a smaller --aurora-ring-mb",
        )
