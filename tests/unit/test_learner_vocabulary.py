"""The learner's own loop on traffic that its day-0 vocabulary does not hold: nobody serves, all else is real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner import curriculum
from aurora_vllm.learner.day0 import make_day0_draft
from aurora_vllm.learner.draft import bank_specs, load_draft
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.remap import plan_move
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.session import Session
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.rows import Field, RowFlag, RowLayout
from aurora_vllm.transport.segment import Segment
from tests.unit.test_day0 import llama
from tests.unit.tiny_world import send

LAYOUT = RowLayout(48, 3, torch.float32)
RING_ROWS = 2000
CYCLE = torch.tensor([200, 307, 251, 299, 222, 311, 280])  # what this target says over and over; not in day 0's 64
EOS = 319


@dataclass
class World:
    """A session and the worker's end of its ring."""

    session: Session
    ring: RingProducer
    bank: WeightBank
    control: ControlBlock
    lm_head: torch.Tensor
    requests: int = 0

    def request(self, prompt: int = 10, answer: int = 60) -> None:
        """One finished greedy request; its states are a function of the token, so that there is something to learn."""
        self.requests += 1
        tokens = CYCLE[(torch.arange(prompt + answer) + self.requests) % len(CYCLE)]
        follows = CYCLE[(torch.arange(prompt + answer) + self.requests + 1) % len(CYCLE)]
        aux = torch.randn(320, 3 * 48, generator=torch.Generator().manual_seed(0))
        rows = torch.zeros(len(tokens) + 1, LAYOUT.row_bytes, dtype=torch.uint8)
        meta = LAYOUT.meta(rows)
        meta[:, Field.REQUEST_LOW] = self.requests
        meta[:-1, Field.POSITION] = torch.arange(len(tokens), dtype=torch.int32)
        meta[:-1, Field.TOKEN] = tokens.int()
        meta[:-1, Field.EMITTED] = torch.where(torch.arange(len(tokens)) >= prompt - 1, follows, -1).int()
        meta[:, Field.PROMPT_LENGTH] = prompt
        meta[-1, Field.FLAGS] = int(RowFlag.END)
        LAYOUT.aux(rows)[:-1] = aux[tokens]
        LAYOUT.last(rows)[:-1] = 500 * self.lm_head[follows]  # of all logits, that of the next token is the highest
        send(self.ring, rows)


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    llama(tmp_path / "target")
    draft = make_day0_draft(tmp_path / "target", tmp_path / "draft", 64)
    specs = bank_specs(load_draft(draft))
    segments = [
        Segment.create("control", control_bytes()),
        Segment.create("ring", ring_bytes(LAYOUT.row_bytes, RING_ROWS)),
        Segment.create("bank", bank_bytes(specs)),
    ]
    control, ring, bank = segments
    made = World(
        session=Session(
            config=AuroraConfig(
                evidence_tokens=80, publish_margin=0.3, publish_interval_s=0, batch_tokens=64, ttt_length=2,
                num_speculative_tokens=2, learning_rate=1e-2, vocabulary_coverage=getattr(request, "param", 0.97),
            ),
            target=tmp_path / "target", draft=draft, hidden_size=48, num_aux=3, dtype="float32",
            ring=ring.name, bank=bank.name, control=control.name,
        ),
        control=ControlBlock.create(control),
        ring=RingProducer.create(ring, LAYOUT.row_bytes, RING_ROWS),
        bank=WeightBank.create(bank, specs),
        lm_head=load_target_head(tmp_path / "target").lm_head,
    )  # fmt: skip
    yield made
    for segment in segments:
        segment.unlink()


def run(world: World, learner: Learner, requests: int) -> None:
    """Requests one after the other, each learned from; stops at the first publish."""
    for _ in range(requests):
        world.request()
        while learner.turn():
            if world.control.learner.publishes:
                return


def test_a_vocabulary_that_misses_the_traffic_is_replaced_judged_and_published_whole(world: World) -> None:
    learner = Learner(world.session)
    learner.curriculum._reselection.enough = 300
    learner.curriculum.skip_lessons()
    day0 = learner.drafts.incumbent.target_ids.clone()
    assert not torch.isin(CYCLE, day0).any() and EOS in day0
    block = world.control.learner

    run(world, learner, 4)
    assert block.vocabulary_changes == 0 and block.vocabulary_coverage == 0.0  # too little was seen
    assert learner.evidence.decide(0.0).tokens > 0
    run(world, learner, 1)
    assert block.vocabulary_changes == 1
    assert torch.isin(CYCLE, learner.drafts.candidate.target_ids).all() and EOS in learner.drafts.candidate.target_ids
    assert torch.equal(learner.drafts.incumbent.target_ids, day0)  # what serves stays until the evidence is in
    assert world.bank.published() == 0 and learner.evidence.decide(0.0).tokens == 0

    run(world, learner, 12)
    assert block.publishes == 1 and block.vocabulary_changes == 1
    assert block.candidate_acceptance_length > 1.3 > block.incumbent_acceptance_length == 1.0
    published = world.bank.read(world.bank.published()).tensors
    for name, tensor in learner.drafts.candidate.state_dict().items():
        assert torch.equal(published[name], tensor), name
    assert torch.equal(learner.drafts.incumbent.target_ids, learner.drafts.candidate.target_ids)
    assert bool((learner.drafts.incumbent.target_ids.diff() > 0).all())
    world.request()
    learner.turn()
    assert block.vocabulary_coverage == pytest.approx(1.0)

    again = Learner(world.session)  # a restarted learner goes on with the vocabulary that serves
    assert torch.equal(again.drafts.candidate.target_ids, learner.drafts.incumbent.target_ids)


@pytest.mark.parametrize("world", [0.0], indirect=True)
def test_without_a_threshold_nothing_changes_and_nothing_can_be_learned(world: World) -> None:
    learner = Learner(world.session)
    learner.curriculum._reselection.enough = 300
    learner.curriculum.skip_lessons()
    run(world, learner, 17)
    assert world.control.learner.vocabulary_changes == 0 and world.bank.published() == 0
    assert world.control.learner.candidate_acceptance_length == 1.0
    assert world.control.learner.vocabulary_coverage == 0.0


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_change_that_finds_no_memory_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """The draft in training and its average have one vocabulary, or the average is none."""
    calls = 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise torch.OutOfMemoryError("no room")
        return plan_move(*arguments)

    learner = Learner(world.session)
    learner.curriculum._reselection.enough = 300
    learner.curriculum.skip_lessons()
    monkeypatch.setattr(curriculum, "plan_move", fails)
    day0 = learner.drafts.incumbent.target_ids.clone()
    run(world, learner, 6)
    assert calls == fails_at and world.control.learner.vocabulary_changes == 0
    assert torch.equal(learner.drafts.candidate.target_ids, day0)
    assert torch.equal(learner.curriculum.trainer.draft.target_ids, day0)
    run(world, learner, 6)  # another try, when as much was seen again
    assert world.control.learner.vocabulary_changes == 1
    assert torch.equal(learner.curriculum.trainer.draft.target_ids, learner.drafts.candidate.target_ids)


def test_a_candidate_that_is_thrown_away_takes_its_vocabulary_and_moments_along(world: World) -> None:
    learner = Learner(world.session)
    learner.curriculum._reselection.enough = 300
    learner.curriculum.skip_lessons()
    run(world, learner, 6)
    assert world.control.learner.vocabulary_changes == 1
    drafts = learner.drafts
    assert not torch.equal(drafts.candidate.target_ids, drafts.incumbent.target_ids)
    drafts.candidate.norm.weight.data[3] = torch.inf
    learner.evidence.min_tokens = learner.evidence.margin = 0
    learner.publisher.publish_if_due()
    assert "not finite" in world.control.learner.message and world.bank.published() == 0
    for draft in (drafts.candidate, learner.curriculum.trainer.draft):
        assert torch.equal(draft.target_ids, drafts.incumbent.target_ids)
        assert torch.isfinite(draft.norm.weight).all()
    assert not learner.curriculum.trainer.optimizer.state
