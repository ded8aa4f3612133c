"""How the model is served where servers are compared: the flags and environment that all of them share."""

from __future__ import annotations

from benchmarks.openmp import intel_openmp

MODEL_NAME = "smollm2-135m"
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # with few cores vLLM would bind its worker to one of them
    # On a CPU vLLM 0.32 saves ahead-of-time artefacts that it cannot load ("no attribute finalize_loading"), so it
    # compiles at every start; its older compile cache works.
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_NO_USAGE_STATS": "1",
    **intel_openmp(),
    "HF_HUB_OFFLINE": "1",
}
# Plain vLLM, as a baseline: demo/roomy_worker.py says why its worker is not simply the default one.
PLAIN = ("--aurora-off", "--worker-cls", "demo.roomy_worker.RoomyWorker")
START_S = 420.0  # longest start, compilation included


def flags(max_num_seqs: int) -> tuple[str, ...]:
    """Flags of every server, after the model's name. max_num_seqs: most requests that run at the same time."""
    return (
        *("--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-seqs", str(max_num_seqs), "--kv-cache-memory-bytes", str(512 << 20)),
    )
