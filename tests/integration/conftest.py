"""Real vLLM engines on a CPU for the whole test session: one of the V1 runner, one of the V2 runner.

The engines carry AuroraWorker and AuroraScheduler; the test itself stands where the learner would be: it reads the
ring and publishes into the bank. Prefix caching is on, prefill is chunked, and the KV cache is small enough to preempt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration import interpreter

if TYPE_CHECKING:
    from benchmarks.engine import Engine
    from tests.integration.served import Served

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # every engine would look into the CPU for a report about tests

# Two processes share the files in this order. Long ones first: one that began last would leave a core without work.
# test_adaptation before test_server, which kills a server at its end: neither may find what the other leaves behind.
LONGEST_FIRST = ("test_adaptation.py", "test_server.py", "test_device_copies.py", "test_capture.py", "test_swap.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = [place for place, item in enumerate(items) if item.path.parent == here]
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    ordered = sorted((items[place] for place in places), key=lambda item: rank.get(item.path.name, len(rank)))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


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


@pytest.fixture(scope="session")
def served_by_v1(engine: Engine, target: Path) -> Served:
    from tests.integration.served import Served

    return Served.real(engine, target)


@pytest.fixture(scope="session")
def served_by_v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM's V2 runner through Triton's interpreter, with the table of draft lengths that the entrypoint gives it."""
    table = [[1, 1, 3], [2, 2, 2], [3, 3, 1], [4, 4, 0]]
    yield from serve_tiny(tmp_path_factory.mktemp("v2"), "v2", num_speculative_tokens_per_batch_size=table)


@pytest.fixture(scope="session")
def served_by_v1_probabilistic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_tiny(tmp_path_factory.mktemp("v1"), "v1", draft_sample_method="probabilistic")


@pytest.fixture(scope="session")
def served_by_v2_probabilistic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_tiny(tmp_path_factory.mktemp("v2"), "v2", draft_sample_method="probabilistic")


@pytest.fixture(scope="session")
def served_by_v2_overlapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve_tiny(tmp_path_factory.mktemp("v2"), "v2", {"TEST_OVERLAPPING_STEPS": "1"})


def serve_tiny(
    directory: Path, runner: str, environment: dict[str, str] | None = None, **draft: Any
) -> Iterator[Served]:
    """A tiny model in a process of its own.

    Args:
        directory: scratch space.
        runner: "v1" or "v2".
        environment: more of it.
        draft: of vLLM's speculative_config.
    """
    from tests.integration.remote import RemoteEngine
    from tests.integration.served import TINY_VOCABULARY, Served, write_tiny_target

    environments = {"v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "v2": interpreter.environment(directory)}
    target = write_tiny_target(directory / "target")
    made = RemoteEngine.launch(
        target,
        directory,
        environments[runner] | (environment or {}),
        worker_cls="tests.integration.worker.InspectableWorker",
        skip_tokenizer_init=True,
        draft_vocab_size=TINY_VOCABULARY - 32,
        kv_cache_memory_bytes=3 << 19,  # 24 blocks: eight requests fit until each needs a third
        speculative=draft,
    )
    yield Served.tiny(made, target, runner)
    made.close()
