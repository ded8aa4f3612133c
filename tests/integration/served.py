"""The same traffic for either of vLLM's runners: an engine, what to ask it, and who knows the right states.

V1 serves the demo's model in the test's own process. V2's kernels are interpreted, so it serves a model small enough for
that, in a process of its own.
"""

from __future__ import annotations

import bisect
import calendar
import fnmatch
import heapq
import inspect
import json
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_vllm.transport.rows import RowLayout
from benchmarks.engine import Engine
from tests.integration.reference import Reference

TEXTS = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is",
    "1 2 3 4 5 6 7 8",
    "Once upon a time there was a",
]
SOURCES = [textwrap, heapq, bisect, shlex, fnmatch, calendar]
V1_RUNNER = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
V2_RUNNER = "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
TINY_VOCABULARY = 128


@dataclass
class Served:
    """One running engine and its traffic."""

    engine: Engine
    runner: str  # the class that has to run it
    reference: Reference
    sources: list[list[int]]  # token ids that prompts are cut from
    short: list[list[int]]  # four prompts of a few tokens
    until_preempted: int  # tokens that eight requests of 60 tokens cannot all generate at the same time

    @classmethod
    def of(cls, engine: Engine, target: Path, tiny: bool) -> Served:
        draft = json.loads((engine.session.draft / "config.json").read_text())
        reference = Reference(target, tuple(draft["eagle_aux_hidden_state_layer_ids"]))
        if tiny:
            generator = torch.Generator().manual_seed(7)
            sources = torch.randint(TINY_VOCABULARY, (6, 2000), generator=generator).tolist()
            short = torch.randint(TINY_VOCABULARY, (4, 9), generator=generator).tolist()
            return cls(engine, V2_RUNNER, reference, sources, short, 20)
        encode = engine.llm.get_tokenizer().encode
        sources = [list(encode(inspect.getsource(source))) for source in SOURCES]
        return cls(engine, V1_RUNNER, reference, sources, [list(encode(text)) for text in TEXTS], 60)

    @property
    def layout(self) -> RowLayout:
        return self.engine.session.row_layout

    def text(self, length: int, chapter: int) -> list[int]:
        """A long prompt. Real code for a real model: on random tokens its float32 is not good to 1e-3."""
        source, start = self.sources[chapter % 6], 300 * (chapter // 6) + 40
        assert len(source) >= start + length
        return source[start : start + length]

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        return self.engine.generate(prompts, detokenize=False, **sampling)

    def finish(self) -> torch.Tensor:
        """All rows so far; one more request flushes the end rows of those before it."""
        self.generate([[11]], max_tokens=1, extra_args={"aurora_learn": False})
        return self.engine.drain()


def write_tiny_target(directory: Path) -> Path:
    """A random Llama of four layers that repeats itself in about every second token, so that drafts get accepted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=TINY_VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
