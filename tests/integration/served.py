"""The same traffic for either of vLLM's runners: an engine, what to ask it, and who knows the right states.

V1 serves the demo's model in the test's own process. V2's kernels are interpreted, so it serves a model small enough
for that, in a process of its own.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aurora_vllm.spec_decode.undrafted import accept_requests
from aurora_vllm.transport.rows import RowLayout
from benchmarks.engine import Engine
from tests.integration.reference import Reference, RequestRows, count_verdicts

TEXTS = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is",
    "1 2 3 4 5 6 7 8",
    "Once upon a time there was a",
]
SOURCES = [textwrap, heapq, bisect, shlex, fnmatch, calendar]
RUNNERS = {
    "v1": "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    "v2": "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
}
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
    def real(cls, engine: Engine, target: Path) -> Served:
        """The demo's model, by V1."""
        encode = engine.llm.get_tokenizer().encode
        sources = [list(encode(inspect.getsource(source))) for source in SOURCES]
        return cls(engine, RUNNERS["v1"], _reference(engine, target), sources, [list(encode(x)) for x in TEXTS], 60)

    @classmethod
    def tiny(cls, engine: Engine, target: Path, runner: str) -> Served:
        """What write_tiny_target wrote, by "v1" or "v2"."""
        generator = torch.Generator().manual_seed(7)
        sources = torch.randint(TINY_VOCABULARY, (6, 2000), generator=generator).tolist()
        short = torch.randint(TINY_VOCABULARY, (4, 9), generator=generator).tolist()
        return cls(engine, RUNNERS[runner], _reference(engine, target), sources, short, 20)

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
        self.engine.let_requests_end()
        return self.engine.drain()

    def assert_vllm_counted_the_same(self, rows: torch.Tensor, before: dict[str, Any]) -> dict[str, Any]:
        """The verdicts in the rows are vllm:spec_decode_* since ``before``, at every position. Returns them."""
        after = self.engine.spec_decode_counters()
        counted = count_verdicts(rows, self.layout)
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            assert counted[name] == after[name] - before.get(name, 0), name
        earlier = before.get("accepted_tokens_per_pos", [0, 0, 0])
        per_position = [a - b for a, b in zip(after["accepted_tokens_per_pos"], earlier, strict=True)]
        assert counted["accepted_tokens_per_pos"] == per_position
        return counted


def answers(requests: Sequence[RequestRows], outputs: Sequence[Any]) -> Iterator[tuple[RequestRows, int, list[int]]]:
    """Each request's rows with the length of its prompt and the answer that the client got.

    Args:
        requests: sorted rows.
        outputs: vLLM's RequestOutput of all of them.
    """
    by_prompt = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in outputs}
    for request in requests:
        length = next(n for n in range(1, len(request.tokens)) if tuple(request.tokens[:n]) in by_prompt)
        yield request, length, list(by_prompt[tuple(request.tokens[:length])])


def answers_to_what_vllm_refuses(engine: Engine, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
    """In the engine's process, where the refusal is put back: other tests run there."""
    from vllm import SamplingParams

    refuse = SamplingParams._validate_spec_decode
    accept_requests()
    try:
        return [list(done.outputs[0].token_ids) for done in engine.generate(prompts, max_tokens=12, **sampling)]
    finally:
        SamplingParams._validate_spec_decode = refuse


def _reference(engine: Engine, target: Path) -> Reference:
    draft = json.loads((engine.session.draft / "config.json").read_text())
    return Reference(target, tuple(draft["eagle_aux_hidden_state_layer_ids"]))


def write_tiny_target(directory: Path, **changes: Any) -> Path:
    """A random Llama of four layers that repeats itself in about every second token, so that drafts get accepted.

    Args:
        changes: of its configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": TINY_VOCABULARY,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(directory)
    return directory
