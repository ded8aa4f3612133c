"""SGLang's and Aurora's endpoints, against real shared memory: a learner, a bank, the worker's stager."""

from __future__ import annotations

import asyncio
import itertools
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from aurora_vllm.interop import sglang_api
from aurora_vllm.interop.endpoints import ENDPOINTS, Endpoint
from aurora_vllm.server.routes import AuroraEndpoints
from tests.unit.sglang_world import INFO, JSON, LEARN, UPDATE, World, learner, world
from tools.compatibility_table import DOCUMENT

__all__ = ["learner", "world"]  # fixtures


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda one: one.path)
def test_each_endpoint_of_the_table_is_there(world: World, endpoint: Endpoint) -> None:
    row = f"| `{endpoint.method} {endpoint.path}` | {endpoint.origin} | {endpoint.answer} | {endpoint.here} |"
    assert row in DOCUMENT.read_text()
    answer = world.client.request(
        endpoint.method, endpoint.path, content=b"{}" if endpoint.body else None, headers=JSON
    )
    codes = {UPDATE: 400, "/push_sample": 422, "/aurora/health": 503}
    assert answer.status_code == codes.get(endpoint.path, 200)
    assert answer.json()
    assert world.client.request("PATCH", endpoint.path).status_code == 405


@pytest.mark.parametrize(
    ("body", "name"), [(e.body, name) for e in ENDPOINTS if e.body is not None for name in e.body.model_fields]
)
def test_each_field_of_the_bodies_is_in_the_table(body: Any, name: str) -> None:
    field = body.model_fields[name]
    assert f"| `{name}` | {'required' if field.is_required() else ''}" in DOCUMENT.read_text()
    assert field.description in DOCUMENT.read_text()


def test_without_the_setting_they_are_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.session.config.model_copy(update={"sglang_api": False})
    monkeypatch.setenv("AURORA_SESSION", world.session.model_copy(update={"config": config}).model_dump_json())
    app = FastAPI()
    AuroraEndpoints().attach_router(app)
    client = TestClient(app)
    assert client.get("/aurora/status").status_code == 200
    assert all(client.request(e.method, e.path).status_code == 404 for e in ENDPOINTS)


def test_a_pushed_sample_is_refused_and_nothing_of_it_is_kept(world: World, capfd: Any) -> None:
    world.control.learner.replay_trajectories = 5
    sample = {"data_id": "secret", "mooncake_key": "secret", "tensor_shapes": {"hs": [3, 48]}, "prompt_tokens": 2}
    for _ in range(2):
        answer = world.client.post("/push_sample", json=sample)
        assert answer.status_code == 501
        assert answer.json() == {"status": "refused", "pool_size": 5, "message": sglang_api.NO_SAMPLES}
    error = capfd.readouterr().err
    assert error.count("a sample was pushed") == 1
    assert "secret" not in error
    del sample["data_id"]
    wrong = world.client.post("/push_sample", json=sample | {"tensor_shapes": "secret"})
    assert wrong.status_code == 422
    assert [fault["loc"] for fault in wrong.json()["detail"]] == [["data_id"], ["tensor_shapes"]]
    assert "secret" not in wrong.text


@LEARN
def test_health_is_the_engines_code_and_the_learners_body(world: World) -> None:
    assert world.client.get("/health").json() == {"status": "waiting", "pool_size": 0}
    assert world.client.get("/aurora/health").status_code == 503
    world.control.server.learner_pid = world.control.learner.pid = 77
    world.control.learner.replay_trajectories = 3
    world.control.learner.beat()
    for path in ("/health", "/aurora/health"):
        answer = world.client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "pool_size": 3})
    world.app.state.vllms_code = 503  # the engine died
    assert world.client.get("/health").status_code == 503
    assert world.client.get("/aurora/health").status_code == 200


def test_the_engines_health_is_vllms_word(world: World) -> None:
    from vllm.entrypoints.serve.instrumentator import health
    from vllm.v1.engine.exceptions import EngineDeadError

    async def check_health() -> None:
        raise EngineDeadError

    app = FastAPI()
    app.include_router(health.router)
    plugin = AuroraEndpoints()
    plugin.attach_router(app)
    app.router.routes.pop(next(i for i, r in enumerate(app.routes) if getattr(r, "path", "") == "/health"))
    app.state.engine_client = Namespace(check_health=check_health)
    assert TestClient(app).get("/health").status_code == 503


def test_health_without_a_learner(world: World) -> None:
    assert (world.client.get("/health").status_code, world.client.get("/health").json()["status"]) == (200, "off")
    assert world.client.get("/aurora/health").status_code == 503


def test_server_info(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 5.0)  # seconds, from one call to the next
    monkeypatch.setattr(sglang_api, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    first = world.client.get(INFO).json()
    assert first["internal_states"][0]["avg_spec_accept_length"] is None
    assert first["internal_states"][0]["last_gen_throughput"] == 0.0
    world.control.scheduler.record(1, 10, 30, 6, [4, 2, 0])
    world.control.scheduler.record(2, 30, 90, 34, [20, 10, 4])
    world.control.scheduler.generated_tokens = 80
    info = world.client.get(INFO).json()
    assert info["internal_states"][0]["avg_spec_accept_length"] == info["avg_spec_accept_length"] == 2.0
    assert info["last_gen_throughput"] == 80 / 5
    assert info["speculative_draft_model_path"] == str(world.session.draft)
    speculative = {
        name: info[f"speculative_{name}"] for name in ("algorithm", "num_steps", "eagle_topk", "num_draft_tokens")
    }
    assert speculative == {"algorithm": "EAGLE3", "num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
    assert (info["model_path"], info["weight_version"]) == (str(world.session.target), "1")
    assert info["version"][0].isdigit()


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_vllms_api_key_is_asked_for(world: World, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "k")
    asyncio.run(world.plugin.init_state(None, None, Namespace(api_key=["other", "k"] if by == "flag" else None)))
    for endpoint in ENDPOINTS:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic k"}):
            answer = world.client.request(endpoint.method, endpoint.path, json={}, headers=headers)
            assert (answer.status_code == 401) == ("health" not in endpoint.path)
        answer = world.client.request(endpoint.method, endpoint.path, json={}, headers={"Authorization": "Bearer k"})
        assert answer.status_code != 401
