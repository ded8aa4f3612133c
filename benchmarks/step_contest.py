"""Our training step and speculators', alternating on the same batch (for benchmarks/learner_step.py)."""

from __future__ import annotations

import copy
import ctypes
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from aurora_vllm.learner.batch import Batch, collate
from aurora_vllm.learner.draft import Eagle3Draft, load_draft
from aurora_vllm.learner.loss import STEP_DECAY
from aurora_vllm.learner.target import TargetHead, load_target_head
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks.speculators_step import TheirTrainer, Variant, their_batch, their_model
from demo.workload import humaneval

ROWS, PROMPT = 256, 64  # rows of a trajectory, and how many are its prompt's
SEQUENCES = (1, 2, 8)
TTT_LENGTH, LEARNING_RATE = 3, 1e-3
LOSS_STEPS = 3
NEVER_FASTER = 1.2  # a variant is dropped if its first step takes this many times the best variant's second step


class Contest:
    """A draft and its target, for three sides: ours, theirs, and theirs with a frozen ``lm_head``."""

    def __init__(self, target: Path, draft: Path, seed: int) -> None:
        self.draft: Eagle3Draft = load_draft(draft)
        self.head: TargetHead = load_target_head(target)
        self.final_norm = _final_norm(target)
        self._tokens = _tokens(target, max(SEQUENCES) * (ROWS + 1), seed)
        self._seed = seed

    def batch(self, sequences: int) -> Shared:
        """A batch of so many sequences; the same tokens and states in every call."""
        generator = torch.Generator().manual_seed(self._seed)
        hidden = self.draft.config.hidden_size
        trajectories, states = [], []
        for tokens in self._tokens.view(-1, ROWS + 1)[:sequences]:
            states.append(10 * torch.randn(ROWS, hidden, generator=generator))  # before the final norm
            aux = 5 * torch.randn(ROWS, self.draft.config.num_aux_hidden_states * hidden, generator=generator)
            last = F.rms_norm(states[-1], (hidden,), self.final_norm, self.draft.config.rms_norm_eps)
            trajectories.append(Trajectory(0, 0, tokens[:-1], aux, last, PROMPT, 0, 0.0, int(tokens[-1])))
        return Shared(collate(trajectories), torch.stack(states), self.draft)

    def ours(self, shared: Shared, dtype: torch.dtype | None = None) -> Callable[[], float]:
        """Our step, on its own copy of the draft. The step returns the loss before it."""
        draft = copy.deepcopy(self.draft)
        trainer = Trainer(draft, self.head, LEARNING_RATE, TTT_LENGTH, matmul_dtype=dtype, warmup_steps=0)
        return lambda: float(trainer.step(shared.batch).total)

    def theirs(self, shared: Shared, variant: Variant, head_frozen: bool = False) -> Callable[[], float]:
        """Their step, on a model of its own. The step returns the loss before it."""
        model = their_model(self.draft, self.head, self.final_norm, variant.attention)
        trainer = TheirTrainer(model, variant, LEARNING_RATE, TTT_LENGTH, head_frozen=head_frozen)
        batch = their_batch(shared.batch, shared.states, shared.counts)
        return lambda: trainer.step(batch)

    def losses(self, shared: Shared) -> dict[str, list[float]]:
        """Losses before each of the first optimizer steps, in float32; ours minus the target's entropy."""
        entropy = target_entropy(shared.batch, shared.counts, self.head.rows(self.draft.target_ids), TTT_LENGTH)
        ours, theirs = self.ours(shared, torch.float32), self.theirs(shared, Variant("sdpa", torch.float32))
        return {
            "ours": [ours() - entropy for _ in range(LOSS_STEPS)],
            "theirs": [theirs() for _ in range(LOSS_STEPS)],
            "target_entropy": [entropy],
        }

    def choose(self, shared: Shared, compiled: bool) -> tuple[Variant, dict[str, Any]]:
        """Their fastest variant by its second step, and the trials: seconds, or why a variant does not run."""
        variants = [
            Variant(attention, dtype) for attention in ("sdpa", "eager") for dtype in (torch.bfloat16, torch.float32)
        ]
        if compiled:
            variants += [Variant("sdpa", dtype, True) for dtype in (torch.bfloat16, torch.float32)]
        trials: dict[str, Any] = {}
        best, best_seconds = variants[0], math.inf
        for variant in variants:
            try:
                step = self.theirs(shared, variant)
                first = timed(step)
                hopeless = not variant.compiled and first > NEVER_FASTER * best_seconds
                seconds = first if hopeless else timed(step)
            except Exception as error:  # whatever their libraries raise where a variant cannot run on a CPU
                trials[variant.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            trials[variant.name] = seconds
            if seconds < best_seconds:
                best, best_seconds = variant, seconds
        if best_seconds == math.inf:
            raise RuntimeError(f"none of their variants runs: {trials}")
        return best, trials

    def run(
        self, shared: Shared, variant: Variant, rounds: int
    ) -> tuple[dict[str, list[float]], dict[str, float | None]]:
        """Seconds of each side's steps, taken in turn, and by how many MiB the first step of each raised this process's
        peak memory, AdamW's state included."""
        sides = {
            "ours": self.ours(shared),
            "theirs": self.theirs(shared, variant),
            "theirs_head_frozen": self.theirs(shared, variant, head_frozen=True),
        }
        memory = {name: peak_mib(step) for name, step in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, step in sides.items():
                seconds[name].append(timed(step))
        return seconds, memory


class Shared:
    """A batch for all sides."""

    def __init__(self, batch: Batch, states: torch.Tensor, draft: Eagle3Draft) -> None:
        assert batch.target_argmax is not None
        self.batch = batch
        self.states = states  # float32 [B, T, H], the target's before its final norm
        self.counts = batch.loss_mask & torch.isin(batch.target_argmax, draft.target_ids)  # bool [B, T]


def target_entropy(batch: Batch, counts: torch.Tensor, head: torch.Tensor, ttt_length: int) -> float:
    """By how much our loss exceeds the KL: the target's entropy, averaged and weighted as the loss. In nats.

    Args:
        counts: bool [B, T], target rows that count.
        head: float32 [D, H], the target's lm_head on the draft vocabulary.
    """
    total = 0.0
    for step in range(ttt_length):
        rows = counts.clone()
        rows[:, : step + 1] = False  # no chain starts that far before these rows
        log_p = torch.log_softmax(batch.last[rows] @ head.T, -1)
        total += STEP_DECAY**step * float(-(log_p.exp() * log_p).sum(-1).mean())
    return total


def timed(step: Callable[[], float]) -> float:
    """Seconds a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak_mib(step: Callable[[], float]) -> float | None:
    """MiB by which a step raises this process's peak memory; None if the system does not report it (man 5 proc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the step would reuse freed memory that glibc has kept
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_mib("VmRSS")
    except (AttributeError, OSError):
        step()
        return None
    step()
    return round(_status_mib("VmHWM") - before, 1)


def _status_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(found[1]) / 1024


def _tokens(target: Path, count: int, seed: int) -> torch.Tensor:
    """Tokens of real text: HumanEval's prompts, one after the other. int64 [count]"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [wordings[0].text for wordings in humaneval()]
    random.Random(seed).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def _final_norm(target: Path) -> torch.Tensor:
    """Weight of the target's final norm. float32 [H]"""
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if "model.norm.weight" in tensors.keys():  # noqa: SIM118 (not a dict)
                return tensors.get_tensor("model.norm.weight").float()
    raise FileNotFoundError(f"no model.norm.weight in {target}")
