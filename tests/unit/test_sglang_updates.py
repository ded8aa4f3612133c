"""Drafts from disk by SGLang's endpoint: with a learner, which publishes and goes on from there, and without."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_vllm.interop import sglang_api
from aurora_vllm.learner.draft import load_draft
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.lesson import Lesson
from tests.unit.sglang_world import JSON, LEARN, UPDATE, World, learner, world

__all__ = ["learner", "world"]  # fixtures


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
    drafts, block = learner.drafts, world.control.learner
    learner.curriculum.teacher = Lesson(drafts.candidate, learner.head)
    learner.curriculum._lessons_due, learner.curriculum._lesson = [0], itertools.repeat(None)
    assert_updated(world, world.update(world.new), 2)
    assert learner.curriculum.next() == ""
    for draft in (drafts.incumbent, drafts.candidate):
        assert all(torch.equal(draft.state_dict()[k], v) for k, v in load_draft(world.new).state_dict().items())
    assert not learner.curriculum.trainer.optimizer.state
    assert (drafts.version, block.published_version, block.publishes) == (2, 2, 1)
    assert learner.curriculum.trainer.refining_since == 0  # somebody's training, to be kept


@LEARN
def test_the_learner_refuses_what_does_not_fit_and_goes_on(world: World, learner: Learner) -> None:
    tensors = load_file(world.new / "model.safetensors")
    save_file(tensors | {"fc.weight": torch.zeros(16, 32)}, world.new / "model.safetensors")
    answer = world.update(world.new)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert "tensor fc.weight has shape [16, 32]" in answer.json()["message"]
    assert (world.bank.published(), learner.drafts.version) == (0, 1)
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
