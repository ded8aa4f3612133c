"""The learner beside a decode load on one GPU, with and without its budget: what it achieves, and what the load loses.

The load imitates decoding: in every step each weight is read once and multiplied with a few rows, as a replayed CUDA
graph, and the host waits for the step as it waits for sampled tokens. The learner runs the product's training step in a
process of its own, and rests as the product's learner does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.budget import CpuBudget, DeviceClock
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.train import Trainer
from aurora_vllm.learner.trajectory import Trajectory
from benchmarks import gpu_processes as processes

QWEN3_8B = Eagle3Config(
    hidden_size=4096, intermediate_size=12_288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    vocab_size=151_936, draft_vocab_size=32_000, target_hidden_size=4096, rope={"rope_type": "default"},
)  # fmt: skip
SHARE = 0.05  # learner_cpu_share's default
TTT_LENGTH, LEARNING_RATE = 3, 1e-3
SEQUENCE = 256  # rows; a quarter of them are the prompt's


def learner_beside_a_load(
    device: str, config: Eagle3Config, rows: int, decode_step: Callable[[], None], seconds: float
) -> dict[str, Any]:
    """Measure each alone, and both together.

    Args:
        rows: rows of a training step.
        decode_step: one step of the load, from :func:`decode_load`.
        seconds: duration of each measurement. The load alone is measured before and after the others.
    """
    alone = [_decode(decode_step, seconds)]
    beside = {}
    for name, share in (("with_budget", SHARE), ("without_budget", 1.0)):
        process, pipe = _start_learner(device, config, rows, share)
        load = _decode(decode_step, seconds)
        beside[name] = {"load": load, "learner": _end_learner(process, pipe)}
    process, pipe = _start_learner(device, config, rows, 1.0)
    time.sleep(seconds)
    learner = _end_learner(process, pipe)
    alone.append(_decode(decode_step, seconds))
    rate = sum(one["steps_per_s"] for one in alone) / 2
    slowdown = {name: rate / max(one["load"]["steps_per_s"], 1e-9) for name, one in beside.items()}
    return {"rows_a_step": rows, "load_alone": alone, "learner_alone": learner, **beside, "load_slowdown": slowdown}


def decode_load(device: str, hidden: int, matrices: int, rows: int = 8) -> Callable[[], None]:
    """A step of the load. matrices: how many, each [hidden, hidden] in bfloat16."""
    weights = [torch.randn(hidden, hidden, device=device).mul_(hidden**-0.5).bfloat16() for _ in range(matrices)]
    x = torch.randn(rows, hidden, device=device).bfloat16()

    def forward() -> torch.Tensor:
        y = x
        for weight in weights:
            y = y @ weight
        return y

    replay, output = processes.captured(device, forward)

    def step() -> None:
        replay()
        output()[0, 0].item()  # waits, as for sampled tokens

    return step


def learn(device: str, config: Eagle3Config, rows: int, share: float, pipe: Connection) -> None:
    """The learner's process: report that it is ready, wait for a message, train until the next one, and report."""
    where = torch.device(device)
    head = TargetHead(*2 * [_random(config.vocab_size, config.target_hidden_size).bfloat16().to(where)])
    trainer = Trainer(Eagle3Draft(config).to(where), head, LEARNING_RATE, TTT_LENGTH)
    batch = collate([_trajectory(config) for _ in range(max(rows // SEQUENCE, 1))], where)
    # With token 0 as the target's first choice everywhere, every row counts, despite the random states.
    batch = replace(batch, target_argmax=torch.zeros_like(batch.input_ids))
    settle = torch.cuda.synchronize if where.type == "cuda" else _nothing
    trainer.step(batch)
    settle()
    pipe.send("ready")
    pipe.recv()
    began, trained, served = time.monotonic(), 0, itertools.count(1)
    clock = DeviceClock(settle)
    budget = CpuBudget(share, clock)
    told = False
    while not told:
        clock.run(lambda: bool(trainer.step(batch)))
        trained += batch.input_ids.numel()
        told = pipe.poll()
        while not told and (pause := budget.debt(next(served))) > 0:
            told = pipe.poll(pause)
    elapsed = time.monotonic() - began
    pipe.send({"rows_per_s": trained / elapsed, "share": clock() / elapsed, "steps": trainer.steps - 1})


def _start_learner(device: str, config: Eagle3Config, rows: int, share: float) -> tuple[Any, Connection]:
    process, pipe = processes.start(learn, device, config, rows, share)
    processes.receive(pipe)
    pipe.send("go")
    return process, pipe


def _end_learner(process: Any, pipe: Connection) -> dict[str, float]:
    pipe.send("enough")
    report: dict[str, float] = processes.receive(pipe)
    process.join()
    return report


def _decode(step: Callable[[], None], seconds: float) -> dict[str, float]:
    step()
    took: list[float] = []
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        step()
        took.append(time.perf_counter() - now)
    took.sort()
    milliseconds = {f"p{share}_ms": 1000 * took[len(took) * share // 100] for share in (50, 99)}
    return {"steps_per_s": len(took) / (time.perf_counter() - began), **milliseconds}


def _trajectory(config: Eagle3Config) -> Trajectory:
    tokens = torch.randint(config.vocab_size, (SEQUENCE,))
    aux = _random(SEQUENCE, config.num_aux_hidden_states * config.target_hidden_size)
    return Trajectory(0, 0, tokens, aux, _random(SEQUENCE, config.target_hidden_size), SEQUENCE // 4, 1, 0.0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(shape[-1] ** -0.5)


def _nothing() -> None:
    pass
