"""How the model is served wherever servers are compared: the same flags and environment for all of them."""

from __future__ import annotations

from benchmarks.openmp import intel_openmp

MODEL_NAME = "smollm2-135m"
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on few cores vLLM would bind its worker to one of them
    # vLLM 0.32 saves ahead-of-time artefacts on a CPU that it then cannot load ("no attribute finalize_loading") and
    # compiles at every start; its older cache works.
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_NO_USAGE_STATS": "1",
    **intel_openmp(),
    "HF_HUB_OFFLINE": "1",
}
START_S = 420.0  # longest a start may take, compilation included


def flags(max_num_seqs: int) -> tuple[str, ...]:
    """After the model's name on the command line of every server; ``max_num_seqs``: requests at once."""
    return (
        *("--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-seqs", str(max_num_seqs), "--kv-cache-memory-bytes", str(512 << 20)),
    )
