"""What the learner's process takes, predicted and measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aurora_vllm import checkpoint, models
from aurora_vllm.checkpoint import Target
from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.draft import bank_tensors, load_draft
from aurora_vllm.learner.memory import MIB, DraftSizes, _step_bytes, predict
from aurora_vllm.learner.train import Trainer
from aurora_vllm.plan import ServePlan, make_plan
from aurora_vllm.session import ENVIRONMENT_KEY, Session
from aurora_vllm.spec_decode.model_runner import ModelRunner
from aurora_vllm.transport.bank import WeightBank
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer
from aurora_vllm.transport.rows import Field, RowFlag
from aurora_vllm.transport.segment import Segment
from tests.unit.naive_eagle3 import Sizes, random_case
from tests.unit.tiny_world import send

SMOLLM2 = Path("~/.cache/aurora_vllm/models/smollm2-135m").expanduser()
TOLERANCE = 0.15
LENGTH = 512  # tokens of every request
# The body is trained, and has gradients and moments, from this many steps after a lesson on. The peak comes after that.
# So has a learner that slept once, and river then.
LEARNER = """
import sys
import river.drift
from aurora_vllm.learner import process, train
train.HEAD_STEPS = 1
sys.exit(process.main())
"""
SIZES = DraftSizes(10_000_000, 576, 576, 192, 1536, 8192, 1728, 576)


def test_every_term_counts_what_it_names() -> None:
    def of(draft: DraftSizes = SIZES, rows: int = 512, ttt_length: int = 3) -> dict[str, int]:
        return asdict(predict(draft, 100, 200, rows, ttt_length, True))

    base = of()
    assert base["target"] == 100 and base["replay"] == 200
    assert base["weights"] == 280_000_000  # seven times, in float32
    assert of(replace(SIZES, embedding=1000))["weights"] == 280_016_000
    assert base["rows"] == 8192 * 576 * 2  # in bfloat16, as the products with them
    assert predict(SIZES, 100, 200, 512, 3, True).total == sum(base.values())
    one, two, four = (of(rows=rows)["step"] for rows in (512, 1024, 2048))
    assert four - two == pytest.approx(2 * (two - one)) and two > one
    fewer, more = (of(ttt_length=length)["step"] for length in (2, 4))
    assert more - one == pytest.approx(one - fewer) and more > one
    assert of(replace(SIZES, vocabulary=4096))["step"] < one


class Held(TorchDispatchMode):
    """Bytes of all storages that are made while it is on, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor) and (key := (storage := one.untyped_storage())._cdata) not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._drop, key)
        return made

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


@pytest.mark.parametrize("matmul", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wide", [{}, {"head_dim": 256}, {"kv_heads": 4, "group": 1, "head_dim": 128}, {"intermediate_size": 2048},
             {"vocab": 3000, "draft_vocab": 3000}],
)  # fmt: skip
def test_a_training_step_takes_what_is_predicted(wide: dict[str, int], matmul: torch.dtype) -> None:
    """Each width in turn the largest: on the demo's model a lesson takes more, and the process does not show a step."""
    inner = {name: wide[name] for name in wide if name == "intermediate_size"}
    sizes = Sizes(
        [700],
        [2],
        **(
            {"hidden": 64, "head_dim": 32, "vocab": 300, "draft_vocab": 200}
            | {name: wide[name] for name in wide if name not in inner}
        ),
    )
    draft, head, batch = random_case(sizes, **inner)
    trainer = Trainer(draft, head, 1e-3, ttt_length=3, matmul_dtype=matmul)
    trainer.step(batch)  # from the second on there are moments
    with Held() as held:
        trainer.step(batch)
    shapes = {name: tuple(tensor.shape) for name, tensor in bank_tensors(draft).items()}
    parameters = sum(one.numel() for one in draft.parameters())
    said = _step_bytes(DraftSizes.of(shapes, parameters, sizes.hidden, 0), 700, 3, matmul == torch.bfloat16)
    assert 0.95 * held.peak < said < 1.5 * held.peak


@pytest.fixture
def plan(tmp_path: Path) -> ServePlan:
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip("the demo's model is not here (make model)")
    config = AuroraConfig(
        ring_mb=16, replay_mb=320, replay_passes=0.08, max_trajectory_tokens=LENGTH, draft_vocab_size=4608,
        vocabulary_coverage=0, publish_margin=9, learner_cpu_share=1, cache_dir=tmp_path,
    )  # fmt: skip
    target = Target(str(SMOLLM2), SMOLLM2, 576, 30, 49152, "float32", 2048)
    draft = models.make_draft(models.resolve_draft(config, target), target, config)
    return make_plan(config, Namespace(), "0", target, draft, ModelRunner("V1", ""))


def test_the_embedding_is_counted_as_it_is_stored(plan: ServePlan) -> None:
    assert checkpoint.target_head_bytes(plan.target) == 49152 * 576 * 4  # tied, float32
    assert plan.learner.target == 49152 * 576 * 4


def test_a_learner_with_a_full_replay_takes_what_the_plan_says(plan: ServePlan) -> None:
    peak = measure(plan)
    learner = plan.learner
    assert abs(learner.total - peak) < TOLERANCE * peak, f"{learner} predicted, {peak / MIB:.0f} MiB measured"
    without = learner.total - learner.replay  # the bound can tell whether the replay is in it
    assert abs(without - peak) > TOLERANCE * peak


def measure(plan: ServePlan) -> int:
    """Bytes a real learner process took, without what it shares, until its replay was full and trained on."""
    sizes = {"control": control_bytes(), "ring": plan.ring_bytes, "bank": plan.bank_bytes}
    segments = {name: Segment.create(name, size) for name, size in sizes.items()}
    control = ControlBlock.create(segments["control"])
    ring = RingProducer.create(segments["ring"], plan.layout.row_bytes, plan.ring_rows)
    WeightBank.create(segments["bank"], plan.draft.specs)
    session = Session(
        config=plan.config, target=plan.target.directory, draft=plan.draft.directory, hidden_size=576, num_aux=3,
        dtype="float32", **{name: segment.name for name, segment in segments.items()},
    )  # fmt: skip
    words = load_draft(plan.draft.directory).target_ids  # so that every position is one to learn from
    requests = plan.config.replay_mb * MIB // (LENGTH * plan.layout.row_bytes) + 2
    environment = {**os.environ, ENVIRONMENT_KEY: session.model_dump_json(), "OMP_NUM_THREADS": "1"}
    learner = subprocess.Popen([sys.executable, "-c", LEARNER], env=environment)
    try:
        deadline = time.monotonic() + 120
        while requests or control.learner.state != "waiting for traffic" or not control.learner.step:
            assert learner.poll() is None and time.monotonic() < deadline
            if requests and ring.free() > LENGTH:
                send(ring, rows_of(plan, words[torch.randint(0, len(words), (LENGTH,))], requests))
                requests -= 1
            else:
                time.sleep(0.02)
        assert control.learner.replay_bytes > 0.95 * plan.config.replay_mb * MIB
        text = Path(f"/proc/{learner.pid}/status").read_text()
    finally:
        learner.kill()
        learner.wait()
        for segment in segments.values():
            segment.unlink()
    high, shared = (int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) << 10 for name in ("VmHWM", "RssShmem"))
    return high - shared


def rows_of(plan: ServePlan, tokens: torch.Tensor, request: int) -> torch.Tensor:
    """One finished greedy request with random states. uint8 [LENGTH + 1, row_bytes]"""
    layout = plan.layout
    rows = torch.zeros(LENGTH + 1, layout.row_bytes, dtype=torch.uint8)
    meta = layout.meta(rows)
    meta[:, Field.REQUEST_LOW], meta[:, Field.PROMPT_LENGTH], meta[:, Field.EMITTED] = request, 20, -1
    meta[:-1, Field.POSITION] = torch.arange(LENGTH, dtype=torch.int32)
    meta[:-1, Field.TOKEN] = tokens.int()
    meta[-1, Field.FLAGS] = int(RowFlag.END)
    layout.aux(rows)[:-1] = torch.randn(LENGTH, layout.aux_width)
    layout.last(rows)[:-1] = torch.randn(LENGTH, layout.hidden_size)
    return rows
