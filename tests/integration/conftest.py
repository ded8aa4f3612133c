"""One real vLLM engine (CPU, V1 runner) on a real model for the whole test session.

The engine carries AuroraWorker and AuroraScheduler; the test itself stands where the learner would be: it reads the
ring and publishes into the bank. Prefix caching is on, prefill is chunked, and the KV cache is small enough to preempt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def target() -> Path:
    """SmolLM2-135M-Instruct in float32."""
    from demo.model import ensure_model

    return ensure_model()


@pytest.fixture(scope="session")
def engine(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from benchmarks.engine import Engine

    made = Engine.start(
        target, tmp_path_factory.mktemp("aurora"), worker_cls="tests.integration.worker.InspectableWorker"
    )
    yield made
    made.close()
