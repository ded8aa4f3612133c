"""/aurora/status and aurora_* metrics: what the control block says, and what they make of it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aurora_vllm import runtime
from aurora_vllm.config import AuroraConfig
from aurora_vllm.server import metrics
from aurora_vllm.server.metrics import METRICS, AuroraCollector
from aurora_vllm.server.routes import AuroraEndpoints, StatusReader
from aurora_vllm.server.status import LEARNER_DOWN_S, learner, status
from aurora_vllm.session import ENVIRONMENT_KEY, PLAIN_KEY, Session, export_plain
from aurora_vllm.spec_decode import undrafted
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from aurora_vllm.vllm_server import allow_plugin

SECOND = 1_000_000_000
NOW = 1000 * SECOND


@pytest.fixture
def session() -> Iterator[tuple[Session, ControlBlock]]:
    with Segment.create("control", control_bytes()) as block, Segment.create("ring", ring_bytes(1088, 10)) as ring:
        control = ControlBlock.create(block)
        producer = RingProducer.create(ring, 1088, 10)
        producer.reserve(4)
        producer.commit()
        config = AuroraConfig()
        paths = {"target": Path("/t"), "draft": Path("/d")}
        sizes = {"hidden_size": 64, "num_aux": 3, "dtype": "float32"}
        names = {"ring": ring.name, "bank": "none", "control": block.name}
        yield Session(config=config, **paths, **sizes, **names, vllm_version="9.9.9"), control


@pytest.fixture
def busy(session: tuple[Session, ControlBlock]) -> tuple[Session, ControlBlock]:
    """A control block of a server that has been at it for a while."""
    _, control = session
    control.worker.live_version, control.worker.previous_version, control.worker.swaps = 3, 2, 2
    control.worker.attached, control.worker.model_runner = True, "V2"
    control.worker.requests_dropped, control.worker.refusals, control.worker.refusal = 5, 6, "not finite"
    control.worker.last_swap_ns = time.monotonic_ns() - 3 * SECOND
    control.scheduler.draft_length, control.scheduler.reason = 2, "it pays"
    control.scheduler.record(2, 10, 30, 6, [4, 2, 0])
    control.scheduler.record(3, 20, 60, 30, [15, 10, 5])
    control.server.learner_pid = control.learner.pid = 77
    control.server.learner_restarts = 4
    control.learner.published_version, control.learner.step = 3, 12
    control.learner.state = "training"
    control.learner.beat()
    return session


def read(session: Session) -> dict[str, Any]:
    return StatusReader(session).read()


def test_status_of_a_busy_server(busy: tuple[Session, ControlBlock]) -> None:
    found = read(busy[0])
    assert json.loads(json.dumps(found)) == found  # all of it is JSON
    assert (found["versions"]["live"], found["versions"]["previous"], found["versions"]["published"]) == (3, 2, 3)
    rows = {row["version"]: row["mean_acceptance_length"] for row in found["versions"]["acceptance"]}
    assert rows == {2: 1.6, 3: 2.5}
    assert (found["speculation"]["draft_length"], found["speculation"]["reason"]) == (2, "it pays")
    assert found["ring"] == {"used": 4, "capacity": 10, "used_share": 0.4}
    assert found["capture"]["requests_dropped"] == 5
    assert (found["swaps"]["swaps"], found["swaps"]["refusal"]) == (2, "not finite")
    assert 3 <= found["swaps"]["last_swap_age_s"] < 60
    assert (found["learner"]["state"], found["learner"]["alive"], found["learner"]["restarts"]) == ("training", True, 4)
    assert (found["learner"]["step"], found["learner"]["pid"]) == (12, 77)
    assert found["config"]["num_speculative_tokens"] == 3
    assert (found["target"], found["draft"]) == ("/t", "/d")
    assert (found["aurora"], found["aurora_version"]) == ("on", metadata.version("aurora-vllm"))
    assert (found["vllm_version"], found["worker"]["model_runner"]) == ("9.9.9", "V2")


def test_status_of_a_fresh_server_is_json_too(session: tuple[Session, ControlBlock]) -> None:
    session[1].learner.loss = float("nan")
    found = json.loads(json.dumps(read(session[0]), allow_nan=False))
    assert found["learner"]["state"] == "waiting"
    assert found["worker"]["heartbeat_age_s"] is None


def learner_of(
    restarts: int = 0, running: int = 7, pid: int = 7, beat_age: float | None = 0.1, wanted: bool = True
) -> Any:
    fields = {
        "pid": pid,
        "state": "training",
        "heartbeat_ns": 0 if beat_age is None else NOW - int(beat_age * SECOND),
    }
    server = {"learner_pid": running, "learner_restarts": restarts}
    return learner({"learner": fields, "server": server}, wanted, NOW)


@pytest.mark.parametrize(
    ("case", "state", "alive"),
    [
        ({}, "training", True),
        ({"beat_age": LEARNER_DOWN_S - 0.1}, "training", True),
        ({"beat_age": LEARNER_DOWN_S + 0.1}, "down", False),  # it runs, and hangs
        ({"running": 0, "pid": 0, "beat_age": None}, "waiting", False),  # for the engine
        ({"pid": 0, "beat_age": None}, "starting", False),
        ({"pid": 6, "restarts": 1}, "starting", False),  # the heartbeat is the old one's
        ({"running": 0, "restarts": 1}, "down", False),  # between two lives
        ({"running": 0, "pid": 0, "beat_age": None, "restarts": 1}, "down", False),  # died before it said anything
        ({"wanted": False, "running": 0, "pid": 0, "beat_age": None}, "off", None),  # nothing to alert anybody about
    ],
)
def test_states_of_the_learner(case: dict[str, Any], state: str, alive: bool | None) -> None:
    found = learner_of(**case)
    assert (found["state"], found["alive"]) == (state, alive)


def test_every_metric_is_in_the_table_and_the_table_in_the_documentation(busy: tuple[Session, ControlBlock]) -> None:
    documented = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert documented.read_text() == metrics.table()
    registry = CollectorRegistry()
    metrics.register(lambda: read(busy[0]), registry)
    page = generate_latest(registry).decode()
    shown = {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}
    assert shown == {metric.name for metric in METRICS}
    assert all(name.startswith("aurora_") for name in shown)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_values_of_metrics(busy: tuple[Session, ControlBlock]) -> None:
    registry = CollectorRegistry()
    metrics.register(lambda: read(busy[0]), registry)
    value = registry.get_sample_value
    assert value("aurora_draft_version_live") == 3
    assert value("aurora_acceptance_length", {"version": "live"}) == 2.5
    assert value("aurora_acceptance_length", {"version": "previous"}) == 1.6
    assert (value("aurora_drafts_total"), value("aurora_accepted_tokens_total")) == (30, 36)
    assert value("aurora_accepted_tokens_per_position_total", {"position": "1"}) == 12
    assert value("aurora_accepted_tokens_per_position_total", {"position": "3"}) is None  # K is 3
    assert value("aurora_learner_alive") == 1
    assert value("aurora_learner_restarts_total") == 4
    assert value("aurora_requests_dropped_total") == 5
    assert (value("aurora_swaps_total"), value("aurora_swap_refusals_total")) == (2, 6)
    assert value("aurora_ring_used_rows") == 4
    build = {"version": metadata.version("aurora-vllm"), "vllm_version": "9.9.9", "model_runner": "V2"}
    assert value("aurora_build_info", build) == value("aurora_up") == 1


def test_versions_that_are_gone_leave_no_series(busy: tuple[Session, ControlBlock]) -> None:
    _, control = busy
    for version in range(4, 200):
        control.scheduler.record(version, 1, 3, 1, [1])
    control.worker.live_version, control.worker.previous_version = 199, 198
    registry = CollectorRegistry()
    metrics.register(lambda: read(busy[0]), registry)
    page = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert sum(len(family.samples) for family in page) < len(METRICS) + 8
    assert registry.get_sample_value("aurora_drafts_total") == 30 + 196  # nothing was taken off


def test_a_status_that_fails_does_not_take_the_page_with_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    registry = CollectorRegistry()

    def fail() -> dict[str, Any]:
        raise ValueError

    metrics.register(fail, registry)
    assert generate_latest(registry) == generate_latest(registry) == b""
    assert caplog.text.count("the status cannot be read") == 1


def test_registering_twice_leaves_one() -> None:
    registry = CollectorRegistry()
    for _ in range(2):
        metrics.register(dict, registry)
    assert len(registry._collector_to_names) == 1


@pytest.fixture
def clean_registry() -> Iterator[None]:
    yield
    for collector in [known for known in REGISTRY._collector_to_names if isinstance(known, AuroraCollector)]:
        REGISTRY.unregister(collector)


def client_of(session: Session | None, monkeypatch: pytest.MonkeyPatch, plain: str = "") -> TestClient:
    monkeypatch.setenv(ENVIRONMENT_KEY, "")  # so that both are put back
    monkeypatch.setenv(PLAIN_KEY, "")
    if plain:
        export_plain(plain)
    monkeypatch.setattr(undrafted, "accept_requests", lambda: None)  # vLLM stays as it is for other tests
    if session is not None:
        monkeypatch.setenv(ENVIRONMENT_KEY, session.model_dump_json())
    app = FastAPI()
    AuroraEndpoints().attach_router(app)
    return TestClient(app)


@pytest.mark.usefixtures("clean_registry")
def test_the_route(busy: tuple[Session, ControlBlock], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    client = client_of(busy[0], monkeypatch)
    first = client.get("/aurora/status").json()
    busy[1].worker.swaps += 1
    assert client.get("/aurora/status").json()["swaps"]["swaps"] == first["swaps"]["swaps"] + 1
    assert b"aurora_swaps_total 3.0" in generate_latest(REGISTRY)
    assert client.get("/metrics").status_code == 404  # vLLM's own serves it


@pytest.mark.usefixtures("clean_registry")
def test_metrics_of_several_processes(
    busy: tuple[Session, ControlBlock], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    page = client_of(busy[0], monkeypatch).get("/metrics")
    assert page.status_code == 200
    assert "aurora_swaps_total 2.0" in page.text
    assert b"aurora_swaps" not in generate_latest(REGISTRY)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("plain", ["vLLM 9.9.9 does not fit (a:b: not in this vLLM)", ""])
def test_without_a_session_the_route_says_so_and_why(monkeypatch: pytest.MonkeyPatch, plain: str) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    answer = client_of(None, monkeypatch, plain).get("/aurora/status")
    reason = plain or "vLLM was started by itself, or with --aurora-off"
    assert (answer.status_code, answer.json()) == (503, {"aurora": "off", "reason": reason})
    shown = [line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith("aurora_")]
    assert shown == ["aurora_up 0.0"]


@pytest.mark.usefixtures("clean_registry")
def test_of_several_servers_of_plain_vllm_each_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert "aurora_up 0.0" in client_of(None, monkeypatch, "it does not fit").get("/metrics").text


def test_vllm_loads_the_plugin_where_the_entrypoint_lets_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = importlib.import_module("vllm.plugins")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert plugins.load_endpoint_plugins() == []
    monkeypatch.setenv("VLLM_PLUGINS", allow_plugin(os.environ))
    (plugin,) = plugins.load_endpoint_plugins()
    assert isinstance(plugin, AuroraEndpoints)


def test_the_plugin_is_one_for_vllm_and_says_when_the_engine_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    plugin = AuroraEndpoints()
    assert (plugin.name, plugin.required_tasks) == ("aurora", None)
    monkeypatch.setattr(runtime, "engine_is_up", threading.Event())
    asyncio.run(plugin.init_state(None, None, Namespace()))
    assert runtime.engine_is_up.is_set()


def test_status_needs_nothing_but_plain_values() -> None:
    with Segment.create("control", control_bytes()) as block:
        snapshot = json.loads(json.dumps(ControlBlock.create(block).snapshot()))
    found = status(snapshot, {"used": 0, "capacity": 0}, {}, AuroraConfig().model_dump(mode="json"), NOW)
    assert found["ring"]["used_share"] == 0
    assert os.fspath(AuroraConfig().cache_dir) == found["config"]["cache_dir"]
