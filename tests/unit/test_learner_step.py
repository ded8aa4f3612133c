"""The benchmark against speculators: its arithmetic, and that both sides do train the same draft on the same rows."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer.testing

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.loss import STEP_DECAY
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks import learner_step
from benchmarks.learner_step import case_figures, summary
from benchmarks.speculators_step import TheirTrainer, Variant, their_batch, their_model, their_tensors
from benchmarks.step_contest import ROWS, SEQUENCES, Shared, peak_mib, target_entropy
from tests.unit.tiny_world import DRAFT_V, H, V, World

FINAL_NORM = torch.linspace(0.5, 1.5, H)


def shared(world: World, lengths: tuple[int, ...], prompt: int = 5) -> Shared:
    """Random sequences; a word is in the draft vocabulary unless it is one of the last two."""
    trajectories, states = [], torch.zeros(len(lengths), max(lengths), H)
    for b, rows in enumerate(lengths):
        states[b, :rows] = world.normal(rows, H)
        last = F.rms_norm(states[b, :rows], (H,), FINAL_NORM, 1e-5)
        tokens = torch.randint(0, V, (rows + 1,), generator=world.generator)
        one = Trajectory(0, 0, tokens[:-1], world.normal(rows, 3 * H), last, prompt, 0, 0.0, int(tokens[-1]))
        trajectories.append(one)
    return Shared(collate(trajectories), states, world.draft())


def test_a_ratio_is_the_median_over_rounds() -> None:
    seconds = {"ours": [1.0, 1.0, 2.0], "theirs": [2.0, 3.0, 8.0], "theirs_head_frozen": [1.0, 2.0, 2.0]}
    figures = case_figures(seconds, rows=6)
    assert figures["ratio"] == 3.0  # of 2, 3 and 4: round by round, not median over median
    assert figures["ratio_spread"] == [2.0, 2.5, 3.5, 4.0]
    assert figures["ratio_head_frozen"] == 1.0
    assert figures["rows_per_s_ours"] == 6.0
    assert figures["rows_per_s_theirs"] == 2.0


def test_the_figure_is_the_smallest_of_the_learners_own_batch() -> None:
    own = AuroraConfig().batch_tokens

    def case(name: str, rows: int, ratio: float, frozen: float) -> dict[str, Any]:
        return {
            "name": name,
            "rows": rows,
            "ratio": ratio,
            "ratio_spread": [ratio] * 4,
            "ratio_head_frozen": frozen,
            "ratio_head_frozen_spread": [frozen] * 4,
        }

    figures, spread = summary([case("a", own, 3.0, 1.4), case("b", own, 2.0, 1.5), case("c", own // 2, 1.0, 0.9)])
    assert figures["learner_step_ratio"] == 2.0
    assert figures["learner_step_ratio_a"] == 3.0
    assert figures["learner_step_ratio_smallest"] == 1.0
    assert figures["learner_step_ratio_head_frozen"] == 1.4
    assert any(sequences * ROWS == own for sequences in SEQUENCES)
    assert spread.keys() == figures.keys()


def test_entropy_is_averaged_as_the_loss_is() -> None:
    world = World()
    batch = shared(world, (8,), prompt=0).batch
    batch.last.zero_()
    counts = torch.zeros(1, 8, dtype=torch.bool)
    counts[0, 3:] = True
    uniform = target_entropy(batch, counts, world.lm_head[:4], 3)
    assert uniform == pytest.approx(math.log(4) * (1 + STEP_DECAY + STEP_DECAY**2))
    # Row 1 aims at nothing a step later, so what is there counts once.
    batch.last[0, 1] = 1000 * world.lm_head[0]
    counts[:] = torch.arange(8) == 1
    counts[0, 3] = True
    assert target_entropy(batch, counts, world.lm_head[:4], 2) == pytest.approx(math.log(4) * (0.5 + STEP_DECAY))


def test_memory_of_a_step() -> None:
    measured = peak_mib(lambda: float(torch.ones(64, 2**18).sum()))
    assert measured is None or 60 < measured < 100


def test_without_speculators_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "speculators", None)
    monkeypatch.setitem(sys.modules, "speculators.models.eagle3", None)
    app = typer.Typer()
    app.command()(learner_step.main)
    result = typer.testing.CliRunner().invoke(app, ["--json", str(tmp_path / "x.json")])
    assert result.exit_code == 2
    assert "pip install --no-deps speculators==" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_batch_of_theirs() -> None:
    one = shared(World(), (6, 9))
    theirs = their_batch(one.batch, one.states, one.counts)
    assert theirs["input_ids"].shape == (1, 5 + 8)
    assert theirs["document_ids"].tolist() == [[0] * 5 + [1] * 8]
    assert theirs["position_ids"].tolist() == [[*range(1, 6), *range(1, 9)]]
    assert torch.equal(theirs["input_ids"][0, :5], one.batch.input_ids[0, 1:6])
    assert torch.equal(theirs["hidden_states"][0, 5:], one.batch.aux[1, :8])  # the state before the token
    assert torch.equal(theirs["verifier_last_hidden_states"][0, 5:], one.states[1, 1:])
    assert torch.equal(theirs["loss_mask"][0, :5], one.counts[0, 1:6])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"norm_before_residual": True, "fc_norm": True, "norm_output": True}])
def test_both_train_the_same(attention: str, options: dict[str, Any]) -> None:
    """Losses of three steps agree, so weights, rows, gradients and optimizer do."""
    pytest.importorskip("speculators.models.eagle3")
    world = World()
    one = shared(world, (23, 17, 40))
    draft, head = world.draft(**options), TargetHead(world.embedding, world.lm_head)
    assert (one.batch.loss_mask & ~one.counts).any(), "some row must be one the draft cannot propose"
    entropy = target_entropy(one.batch, one.counts, head.rows(draft.target_ids), 3)
    variant = Variant(attention, torch.float32)
    model = their_model(draft, head, FINAL_NORM, attention)
    theirs = TheirTrainer(model, variant, learning_rate=1e-2, ttt_length=3)
    ours = Trainer(draft, head, 1e-2, 3, matmul_dtype=torch.float32, warmup_steps=0)
    packed = their_batch(one.batch, one.states, one.counts)
    for _ in range(3):
        assert float(ours.step(one.batch).total) - entropy == pytest.approx(theirs.step(packed), rel=2e-4)
    trained = their_tensors(draft, head, FINAL_NORM)
    for name, tensor in model.state_dict().items():
        assert (tensor.float() - trained[name].float()).abs().mean() < 2e-4, name


def test_a_frozen_head_stays() -> None:
    pytest.importorskip("speculators.models.eagle3")
    world = World()
    one = shared(world, (30,))
    model = their_model(world.draft(), TargetHead(world.embedding, world.lm_head), FINAL_NORM, "sdpa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TheirTrainer(model, Variant("sdpa", torch.float32), 1e-2, 3, head_frozen=True).step(
        their_batch(one.batch, one.states, one.counts)
    )
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "fc.weight" in changed
    assert not changed & {"lm_head.weight", "verifier_lm_head.weight", "embed_tokens.weight", "verifier_norm.weight"}
    assert model.lm_head.weight.shape == (DRAFT_V, H)
