"""The learner's pieces on a device that is none (pretend_device.py): nothing of another device gets in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.checkpoints import newest
from aurora_vllm.learner.curriculum import Curriculum
from aurora_vllm.learner.draft import save_draft
from aurora_vllm.learner.evaluate import simulate
from aurora_vllm.learner.from_disk import read_replacement
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.objective import Objective
from aurora_vllm.learner.remap import plan_move
from aurora_vllm.learner.standing import follow_rollback
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Branch
from aurora_vllm.learner.vocabulary import Coverage, Reselection
from aurora_vllm.transport import placement
from aurora_vllm.transport.placement import CPU, place
from tests.unit.pretend_device import DEVICE, Far, pretend_device
from tests.unit.test_lesson import day0_draft, linear_world
from tests.unit.test_placement import StandIn, parts
from tests.unit.tiny_world import DRAFT, V, World, serve, session, trajectory

pytestmark = [
    pytest.mark.usefixtures("same_every_time"),
    pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter"),  # "meta" is only what it says it is
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretend_device(monkeypatch) as made:
        yield made


def test_the_device_refuses_what_a_gpu_refuses(device: torch.device) -> None:
    far, near = torch.ones(3).to(device), torch.ones(3)
    assert isinstance(far, Far) and isinstance(torch.zeros(2, device=device), Far)
    assert far[torch.tensor([0, 2])].tolist() == [1, 1] and (far * 2).cpu().tolist() == [2, 2, 2]
    for mixed in (lambda: far + near, lambda: torch.equal(far, near), lambda: near[far.long()], lambda: far.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()


def steps_on(where: torch.device, direction: str) -> list[float]:
    """What three optimizer steps on two trajectories, one with a branch, and a simulation come to."""
    world = World()
    one, other = trajectory(world), trajectory(world, 7)
    one.branches.append(Branch(8, 0, torch.tensor([3, 5]), one.last[:2].clone()))
    draft = World(1).draft().to(where)
    head = TargetHead(world.embedding, world.lm_head).to(where)
    objective = Objective(direction, 0.5)  # type: ignore[arg-type]
    trainer = Trainer(draft, head, 1e-2, 3, objective=objective, matmul_dtype=torch.float32)
    found = [float(trainer.step(collate([one, other], where)).total) for _ in range(3)]
    state = {name: tensor.cpu() for name, tensor in trainer.state_tensors().items()}
    trainer.load_state_tensors(state, 3, None)
    found.append(float(trainer.step(collate([one, other], where)).total))
    score = simulate(draft, head, other, 2)
    return [*found, float(draft.fc.weight.detach().norm()), score.steps, *score.accepted]


@pytest.mark.parametrize("direction", ["forward", "reverse+next-token"])
def test_a_step_is_the_one_of_the_cpu(device: torch.device, direction: str) -> None:
    assert steps_on(device, direction) == pytest.approx(steps_on(CPU, direction))


def test_another_vocabulary(device: torch.device, tmp_path: Path) -> None:
    world = World()
    draft, head = world.draft().to(device), TargetHead(world.embedding, world.lm_head).to(device)
    trainer = Trainer(draft, head, 1e-2, 2)
    trainer.step(collate([trajectory(world)], device))
    coverage = Coverage(V)
    coverage.observe(torch.full((500,), V - 1))
    assert coverage.share(draft.target_ids) == 0
    chosen = Reselection(tmp_path, 0.9, enough=100).propose(coverage, draft.target_ids)
    assert chosen is not None and V - 1 in chosen.tolist()
    assert plan_move(draft, head, chosen, trainer.optimizer)() == 1
    assert coverage.share(draft.target_ids) == 1
    trainer.step(collate([trajectory(world)], device))


def test_a_draft_from_disk_with_an_embedding_of_its_own(device: torch.device, tmp_path: Path) -> None:
    world = World()
    running = world.draft()
    running.embed_tokens = world.embedding.clone()
    save_draft(running, tmp_path / "own", DRAFT)
    save_draft(world.draft(), tmp_path / "none", DRAFT)
    running.to(device)
    head = TargetHead(world.embedding, world.lm_head).to(device)
    for name in ("own", "none"):
        found = read_replacement(tmp_path / name, running, lambda: head.embed_tokens)
        assert isinstance(found.embed_tokens, Far) and isinstance(found.fc.weight.data, Far)


def taught_on(where: torch.device, directory: Path) -> dict[str, torch.Tensor]:
    """A day-0 draft after its first lesson and one gradient step."""
    draft, head = day0_draft()
    norm = draft.norm.weight.detach().clone()
    settings = AuroraConfig(vocabulary_coverage=0.0, ttt_length=2, batch_tokens=30)
    curriculum = Curriculum(draft.to(where), head.to(where), settings, directory, worth_keeping=False)
    for one in linear_world(head, norm, 20, 30):
        curriculum.add(one)
    assert curriculum.next() == "first lesson"
    while not curriculum.work():
        assert curriculum.next() == "first lesson" and curriculum.works_on_host == (where != CPU)
    assert curriculum.next() == "training" and not curriculum.works_on_host
    curriculum.work()
    return {name: tensor.detach().cpu() for name, tensor in draft.state_dict().items()}


def test_a_lesson_is_the_one_of_the_cpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_vllm.learner.curriculum.LESSON_ROWS", (300, 900))
    monkeypatch.setattr("aurora_vllm.learner.train.fast_matmul_dtype", lambda device: torch.float32)
    near, far = taught_on(CPU, tmp_path), taught_on(device, tmp_path)
    for name, tensor in near.items():
        torch.testing.assert_close(far[name], tensor)


def test_a_rollback_and_a_checkpoint(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, stand_in = World(), StandIn()
    monkeypatch.setattr(placement, "memory_for", lambda device: stand_in)
    monkeypatch.setattr(placement, "try_elsewhere", lambda device, names: None)
    settings = {"sync": "steps", "sync_interval": 2, "checkpoint_dir": tmp_path / "kept"}
    with session(world, tmp_path, **settings) as (shared, _):
        ring, bank, control = parts(shared)
        producer, _weights = place(ring, bank, DEVICE, control.worker, wanted=True)
        learner = Learner(shared)
        serve(world, learner, producer, range(6))
        assert learner.drafts.version >= 2 and not learner.curriculum.fault
        learner.keeper.save(at_once=True)
        assert newest(tmp_path / "kept") is not None, control.learner.checkpoint
        again = Learner(shared)
        assert again.curriculum.trainer.steps == learner.curriculum.trainer.steps
        assert torch.equal(again.drafts.candidate.fc.weight, learner.drafts.candidate.fc.weight)
        serve(world, again, producer, range(6, 9))
        control.worker.rolled_back_version, control.worker.live_version = again.drafts.version, 1
        follow_rollback(again)
        assert again.drafts.version == 1 and isinstance(again.drafts.incumbent.fc.weight.data, Far)
        serve(world, again, producer, range(9, 12))
        assert not again.curriculum.fault
