"""SGLang's and Aurora's endpoints, against real shared memory: a learner, a bank, the worker's stager."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.draft import Eagle3Config, Eagle3Draft, bank_specs, load_draft, save_draft
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.semantics import sglang_api
from aurora_vllm.semantics.endpoints import ENDPOINTS, Endpoint
from aurora_vllm.server.metrics import AuroraCollector
from aurora_vllm.server.routes import AuroraEndpoints
from aurora_vllm.session import Session
from aurora_vllm.spec_decode.stager import Stager
from aurora_vllm.spec_decode.swap import StagedWeights, SwapRefused
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from tests.unit.test_from_disk import CONFIG, EMBEDDING, new_draft
from tools.compatibility_table import DOCUMENT

JSON = {"Content-Type": "application/json; charset=utf-8"}
UPDATE, INFO = "/update_weights_from_disk", "/get_server_info"


class FakeDraft:
    """Stands for vLLM's draft behind the real stager."""

    refusal = ""

    def stage(self, version: int, tensors: Mapping[str, torch.Tensor]) -> StagedWeights:
        if self.refusal:
            raise SwapRefused(self.refusal)
        return StagedWeights(version, [])


@dataclass
class World:
    """What a running server has, without vLLM."""

    session: Session
    control: ControlBlock
    bank: WeightBank
    draft: FakeDraft
    stager: Stager
    plugin: AuroraEndpoints
    app: FastAPI
    new: Path  # a draft from elsewhere that fits

    @property
    def client(self) -> TestClient:
        return TestClient(self.app)

    def update(self, path: Path, **more: Any) -> httpx.Response:
        body = {"model_path": str(path), "update_draft_model": True} | more
        return self.client.post(UPDATE, json=body)


@pytest.fixture(params=[False])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Without a learner process; ``learn`` says whether one is wanted."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    (tmp_path / "target").mkdir()
    save_file({"model.embed_tokens.weight": EMBEDDING}, tmp_path / "target" / "model.safetensors")
    (tmp_path / "target" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_draft(new_draft(1), tmp_path / "draft", CONFIG)
    save_draft(new_draft(2), tmp_path / "new", CONFIG)
    specs = bank_specs(Eagle3Draft(Eagle3Config.from_hf(CONFIG)))
    with (
        Segment.create("control", control_bytes()) as block,
        Segment.create("bank", bank_bytes(specs)) as bank_segment,
        Segment.create("ring", ring_bytes(320, 10)) as ring,
    ):
        control, bank = ControlBlock.create(block), WeightBank.create(bank_segment, specs)
        RingProducer.create(ring, 320, 10)
        session = Session(
            config=AuroraConfig(sglang_api=True, learn=request.param),
            target=tmp_path / "target",
            draft=tmp_path / "draft",
            hidden_size=16,
            num_aux=3,
            dtype="float32",
            ring=ring.name,
            bank=bank_segment.name,
            control=block.name,
        )
        control.worker.live_version, control.worker.attached = 1, 1
        monkeypatch.setenv("AURORA_SESSION", session.model_dump_json())
        draft = FakeDraft()
        stager = Stager(bank, draft, control)  # type: ignore[arg-type]
        app, plugin = FastAPI(), AuroraEndpoints()

        async def vllms_health(raw_request: Request) -> Response:
            return Response(status_code=app.state.vllms_code)

        app.state.vllms_code = 200
        app.add_api_route("/health", vllms_health, methods=["GET"])
        plugin.attach_router(app)
        app.router.routes.remove(next(r for r in app.routes if getattr(r, "endpoint", None) is vllms_health))  # as vLLM
        yield World(session, control, bank, draft, stager, plugin, app, tmp_path / "new")
        stager.close()
    for collector in [known for known in REGISTRY._collector_to_names if isinstance(known, AuroraCollector)]:
        REGISTRY.unregister(collector)


@pytest.fixture
def learner(world: World) -> Iterator[Learner]:
    """A real learner, in a thread."""
    made, stop = Learner(world.session), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            made.turn()
            stop.wait(0.01)

    world.control.learner.pid = world.control.server.learner_pid = 77
    made.control.learner.beat()
    thread = threading.Thread(target=loop)
    thread.start()
    yield made
    stop.set()
    thread.join()


LEARN = pytest.mark.parametrize("world", [True], indirect=True)


# --- the table ---


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


# --- POST /update_weights_from_disk ---


def assert_updated(world: World, answer: httpx.Response, version: int) -> None:
    assert answer.status_code == 200
    message = f"Succeeded to update model weights: draft version {version}."
    assert answer.json() == {"success": True, "message": message, "num_paused_requests": 0}
    found, wanted = world.bank.read(version).tensors, load_draft(world.new).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert world.control.worker.live_version < version  # nobody made a step yet,
    world.stager.commit_if_ready()  # and the next one
    assert world.control.worker.live_version == version


def test_without_a_learner_the_server_publishes(world: World) -> None:
    assert_updated(world, world.update(world.new), 2)
    assert_updated(world, world.update(world.new, flush_cache=True, weight_version="x", unknown=1), 3)


def test_without_a_learner_the_server_refuses_what_does_not_fit(world: World) -> None:
    tensors = load_file(world.new / "model.safetensors")
    save_file(tensors | {"fc.weight": torch.zeros(16, 32)}, world.new / "model.safetensors")
    answer = world.update(world.new)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "tensor fc.weight has shape [16, 32]" in answer.json()["message"]
    assert world.bank.published() == 0


@LEARN
def test_with_a_learner_the_learner_publishes_and_learns_on_from_there(world: World, learner: Learner) -> None:
    learner.curriculum.trainer.optimizer.state[learner.curriculum.trainer.parameters[0]] = {"exp_avg": torch.ones(1)}
    # A lesson of the draft before is due, and one is under way; the learner's thread may go on with it at any moment.
    learner.curriculum.teacher = Lesson(learner.candidate, learner.head)
    learner.curriculum._lessons_due, learner.curriculum._lesson = [0], itertools.repeat(None)
    assert_updated(world, world.update(world.new), 2)
    assert learner.curriculum.next() == ""
    for draft in (learner.incumbent, learner.candidate):
        assert all(torch.equal(draft.state_dict()[k], v) for k, v in load_draft(world.new).state_dict().items())
    assert learner.candidate.fc.weight.data_ptr() != learner.incumbent.fc.weight.data_ptr()
    assert not learner.curriculum.trainer.optimizer.state
    assert (learner.version, world.control.learner.published_version, world.control.learner.publishes) == (2, 2, 1)
    assert learner.curriculum.trainer.refining_since == 0  # somebody's training, to be kept


@LEARN
def test_the_learner_refuses_what_does_not_fit_and_goes_on(world: World, learner: Learner) -> None:
    tensors = load_file(world.new / "model.safetensors")
    save_file(tensors | {"fc.weight": torch.zeros(16, 32)}, world.new / "model.safetensors")
    answer = world.update(world.new)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "tensor fc.weight has shape [16, 32]" in answer.json()["message"]
    assert (world.bank.published(), learner.version) == (0, 1)
    save_file(tensors, world.new / "model.safetensors")
    assert_updated(world, world.update(world.new), 2)


@LEARN
def test_the_release_has_no_prompt_weight(world: World) -> None:
    """The semantics of the session are those the learner trains with."""
    for semantics, weight in (("default", 0.3), ("aurora-release", 0.0)):
        config = world.session.config.model_copy(update={"semantics": semantics, "prompt_weight": 0.3})
        trainer = Learner(world.session.model_copy(update={"config": config})).curriculum.trainer
        assert (trainer.semantics, trainer.prompt_weight) == (semantics, weight)


@pytest.mark.parametrize("more", [{"update_draft_model": False}, {}])
def test_the_target_is_never_touched(world: World, more: dict[str, Any]) -> None:
    answer = world.client.post(UPDATE, json={"model_path": str(world.new)} | more)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "the target's weights are never touched" in answer.json()["message"]
    assert world.bank.published() == 0


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"{", "Invalid JSON"), (b"{}", "model_path: Field required"), (b'{"model_path": 3}', "model_path")],
)
def test_a_body_that_is_none(world: World, content: bytes, line: str) -> None:
    answer = world.client.post(UPDATE, content=content, headers=JSON)
    assert answer.status_code == 400
    assert line in answer.json()["message"]


@pytest.mark.parametrize("endpoint", [UPDATE, "/push_sample"])
def test_a_web_page_cannot_send_it_unasked(world: World, endpoint: str) -> None:
    body = json.dumps({"model_path": str(world.new), "update_draft_model": True}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert world.client.post(endpoint, content=body, headers={"Content-Type": kind}).status_code == 415
    assert world.bank.published() == 0


def test_what_the_worker_refuses_is_no_success(world: World) -> None:
    world.draft.refusal = "lm_head.weight: not finite"
    answer = world.update(world.new)
    assert answer.json() == {
        "success": False, "message": "version 2: lm_head.weight: not finite", "num_paused_requests": 0
    }  # fmt: skip


def test_a_worker_that_does_not_take_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.stager.close()
    monkeypatch.setattr(sglang_api, "WORKER_S", 0.1)
    assert world.update(world.new).json()["message"] == "published as version 2, but the worker has not taken it."
    world.control.worker.attached = 0
    assert "plain vLLM" in world.update(world.new).json()["message"]


@LEARN
def test_a_learner_that_is_not_there_or_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.update(world.new).json()["message"] == "only the learner publishes, and it is waiting; ask again"
    world.control.server.learner_pid = world.control.learner.pid = 77
    world.control.learner.beat()
    monkeypatch.setattr(sglang_api, "LEARNER_S", 0.1)
    assert (
        world.update(world.new).json()["message"]
        == "the learner did not answer within 0.1 s; where it had begun, it may still publish"
    )
    world.control.server.learner_pid, world.control.server.learner_restarts = 0, 1
    assert world.update(world.new).json()["message"] == "only the learner publishes, and it is down; ask again"
    assert world.bank.published() == 0


@LEARN
def test_waiting_for_the_learner_holds_up_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_api, "LEARNER_S", 1.0)
    world.control.server.learner_pid = world.control.learner.pid = 77

    async def traffic() -> tuple[list[float], list[str]]:
        transport = httpx.ASGITransport(app=world.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model_path": str(world.new), "update_draft_model": True}
            updates = [asyncio.create_task(client.post(UPDATE, json=body)) for _ in range(2)]
            times = []
            while not all(update.done() for update in updates):
                started = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                times.append(time.monotonic() - started)
            return times, sorted([(await update).json()["message"] for update in updates])

    times, messages = asyncio.run(traffic())
    assert len(times) > 20
    assert max(times) < 0.5
    assert messages == [
        "another update is under way; ask again",
        "the learner did not answer within 1 s; where it had begun, it may still publish",
    ]


# --- the others ---


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
