"""A target of 32 words, each always followed by the same; its drafts, its traffic, and a session a learner can join."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aurora_vllm.config import AuroraConfig
from aurora_vllm.learner.assembler import Assembler
from aurora_vllm.learner.draft import Eagle3Draft, bank_specs, save_draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.learner import Learner
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.session import Session
from aurora_vllm.transport.bank import WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.rows import Field, RowFlag, RowLayout
from aurora_vllm.transport.segment import Segment

V, H, LAYERS, DRAFT_V = 32, 32, 8, 30
LAYOUT = RowLayout(H, 3, torch.float32)
DRAFT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": V,
    "draft_vocab_size": DRAFT_V,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "num_hidden_layers": 1,
}
SETTINGS: dict[str, Any] = {
    "num_speculative_tokens": 2,
    "ttt_length": 2,
    "batch_tokens": 128,
    "learning_rate": 1e-2,
    "replay_passes": 1000.0,
    "evidence_tokens": 100,
    "publish_interval_s": 0.0,
}


class World:
    """Words, states and weights, all random by ``seed`` but the same every time."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.follows = torch.randperm(V, generator=self.generator)  # the word after each word
        self.lm_head = torch.linalg.qr(self.normal(V, H)).Q.contiguous()
        self.embedding = self.normal(V, H)
        self.aux = self.normal(V, 3 * H)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def save_target(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["LlamaForCausalLM"], "hidden_size": H, "vocab_size": V, "num_hidden_layers": LAYERS}
        (directory / "config.json").write_text(json.dumps(config))
        tensors = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.lm_head}
        save_file(tensors, directory / "model.safetensors")
        return directory

    def draft(self, **options: Any) -> Eagle3Draft:
        """An untrained one that may say all words but the last two."""
        draft = Eagle3Draft(Eagle3Config.from_hf(DRAFT | options))
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.copy_(self.normal(*parameter.shape) * 0.2 + (parameter.dim() == 1))
        return draft

    def rows(self, request: int, prompt: int = 4, answer: int = 16, first: int | None = None) -> torch.Tensor:
        """All rows of one greedy request and its end. uint8 [prompt + answer + 1, row_bytes]"""
        words = [first if first is not None else request % V]
        while len(words) < prompt + answer:
            words.append(int(self.follows[words[-1]]))
        packed = torch.zeros(len(words) + 1, LAYOUT.row_bytes, dtype=torch.uint8)
        meta, tokens = LAYOUT.meta(packed), torch.tensor(words)
        meta[:, Field.REQUEST_LOW] = request
        meta[:, Field.PROMPT_LENGTH] = prompt
        meta[:-1, Field.POSITION] = torch.arange(len(words))
        meta[:-1, Field.TOKEN] = tokens
        meta[:, Field.EMITTED] = -1
        meta[prompt - 1 : -1, Field.EMITTED] = self.follows[tokens[prompt - 1 :]].int()
        meta[-1, Field.FLAGS] = int(RowFlag.END)
        LAYOUT.aux(packed)[:-1] = self.aux[tokens]
        LAYOUT.last(packed)[:-1] = 8 * self.lm_head[self.follows[tokens]]
        return packed


def send(producer: RingProducer, rows: torch.Tensor) -> None:
    """What the worker does."""
    views = producer.reserve(len(rows))
    assert views is not None
    for view in views:
        view.copy_(rows[: len(view)])
        rows = rows[len(view) :]
    producer.commit()


@contextmanager
def session(
    world: World, directory: Path, draft: Path | None = None, resume: Path | None = None, **settings: Any
) -> Iterator[tuple[Session, RingProducer]]:
    """Shared memory as a server makes it. Without ``draft`` an untrained one is written."""
    if draft is None:
        draft = directory / "draft"
        if not draft.exists():
            save_draft(world.draft(), draft, DRAFT)
    target = directory / "target"
    if not target.exists():
        world.save_target(target)
    specs = bank_specs(world.draft())
    with ExitStack() as stack:
        sizes = {
            "ring": ring_bytes(LAYOUT.row_bytes, 4000),
            "bank": bank_bytes(specs),
            "control": control_bytes(),
        }
        ring, bank, control = (stack.enter_context(Segment.create(kind, size)) for kind, size in sizes.items())
        producer = RingProducer.create(ring, LAYOUT.row_bytes, 4000)
        WeightBank.create(bank, specs)
        ControlBlock.create(control)
        yield (
            Session(
                config=AuroraConfig(**(SETTINGS | settings)),
                target=target,
                draft=draft,
                hidden_size=H,
                num_aux=3,
                dtype="float32",
                ring=ring.name,
                bank=bank.name,
                control=control.name,
                resume=resume,
                model="owner/tiny",
                command=("aurora-vllm", "serve", "owner/tiny"),
            ),
            producer,
        )


def trajectory(world: World, request: int = 999) -> Trajectory:
    (one,) = Assembler(LAYOUT).feed(world.rows(request))
    return one


def serve(world: World, learner: Learner, producer: RingProducer, requests: range) -> None:
    """Requests one after the other, the learner keeping up and training a step on each."""
    for request in requests:
        send(producer, world.rows(request))
        learner.turn()
        learner.turn()


def weights(draft: Eagle3Draft) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
