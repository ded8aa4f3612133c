"""Triton's interpreter as a Triton backend called "cpu": vLLM's V2 runner, whose kernels are all Triton, without a GPU.

With ``TRITON_INTERPRET=1`` every ``@triton.jit`` function runs in Python, and nothing is ever compiled. vLLM asks for
more before it believes that there is Triton on a CPU: a backend of that name, found through the entry points of an
installed distribution. ``environment`` makes one, in a directory of the test's own. Slow, and in a process of its own,
because vLLM and Triton decide such things once, when they are imported.
"""

from __future__ import annotations

from pathlib import Path

from tests.integration.paths import python_path

DISTRIBUTION = "aurora_triton_interpreter"


def environment(directory: Path) -> dict[str, str]:
    """What a process that is to run the V2 runner needs in its environment. directory: scratch space."""
    info = directory / f"{DISTRIBUTION}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[triton.backends]\ncpu = {__name__}\n")
    return {
        "PYTHONPATH": python_path(directory),
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
