"""What a running server has, without vLLM: real shared memory, a learner, a bank, the worker's stager."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from safetensors.torch import save_file

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.draft import Eagle3Draft, bank_specs, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.learner import Learner
from aurora_vllm.server.metrics import AuroraCollector
from aurora_vllm.server.routes import AuroraEndpoints
from aurora_vllm.session import Session
from aurora_vllm.spec_decode import undrafted
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.exchange import StagedWeights
from aurora_vllm.spec_decode.stager import Stager
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from tests.unit.test_from_disk import CONFIG, EMBEDDING, new_draft

JSON = {"Content-Type": "application/json; charset=utf-8"}
UPDATE, INFO = "/update_weights_from_disk", "/get_server_info"


class FakeDraft:
    """Stands for vLLM's draft behind the real stager."""

    refusal = ""

    def rehearse(self, specs: object) -> None: ...

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
        monkeypatch.setattr(undrafted, "accept_requests", lambda: None)  # vLLM stays as it is for other tests
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
