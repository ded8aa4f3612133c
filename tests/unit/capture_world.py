"""Steps of every kind for the two ways to fill rows: what vLLM's runners hand over, and what they could."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch

from aurora_vllm.spec_decode.row_fill import RowFill
from aurora_vllm.spec_decode.trace import COUNTERS, StepTrace, TraceWriter
from aurora_vllm.transport.rows import RowLayout


class Rows:
    """A sink whose rows stay, with something in them before; every reservation is in two pieces, as at a wrap."""

    def __init__(self, layout: RowLayout, device: str) -> None:
        self._row_bytes, self._device = layout.row_bytes, device
        self.rows: list[torch.Tensor] = []

    def free(self) -> int:
        return 1000

    def reserve(self, n: int) -> list[torch.Tensor]:
        rows = torch.full((n, self._row_bytes), 255, dtype=torch.uint8, device=self._device)
        self.rows.append(rows)
        return [view for view in (rows[: n // 3], rows[n // 3 :]) if len(view)]

    def commit(self) -> None:
        pass

    def all(self) -> torch.Tensor:
        return torch.cat([torch.empty(0, self._row_bytes, dtype=torch.uint8), *(rows.cpu() for rows in self.rows)])


def writer_of(layout: RowLayout, fill: RowFill, device: str, opted_out: int) -> tuple[TraceWriter, Rows]:
    """A writer that follows four requests. opted_out: bit of each request that keeps itself out."""
    sink = Rows(layout, device)
    control: Any = SimpleNamespace(worker=SimpleNamespace(**dict.fromkeys(COUNTERS, 0)))
    writer = TraceWriter(sink, layout, control, seed=3, fill=fill)
    for i in range(4):
        writer.begin(f"r{i}", prompt_length=7 + i, temperature=0.5 * i, may_learn=not opted_out >> i & 1)
    return writer, sink


def layout_of(rng: random.Random) -> RowLayout:
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    return RowLayout(rng.choice((1, 3, 4, 5, 8, 13, 24)), rng.choice((3, 3, 0, 1, 5)), dtype)


def step_of(rng: random.Random, layout: RowLayout, device: str) -> StepTrace:
    """Requests inside their prompts, with drafts and without; tensors of either integer, padded, strided."""
    count = rng.randint(1, 4)
    drafts = [rng.choice((0, 0, 1, 3)) if rng.random() < 0.8 else 2 for _ in range(count)]
    if rng.random() < 0.2:
        drafts = [0] * count
    lengths = [d + rng.randint(1, 5) for d in drafts]
    total, width = sum(lengths), 1 + max(drafts) + rng.randint(0, 2)
    sampled = torch.tensor([[rng.randint(0, 9) for _ in range(width)] for _ in range(count)])
    for row, d in zip(sampled, drafts, strict=True):
        row[1 + rng.randint(0, d) :] = -1
    sampled = _laid_out(rng, sampled.to(rng.choice((torch.int32, torch.int64)))).to(device)
    padded = total + rng.randint(0, 3)
    states = [torch.tensor([rng.random() for _ in range(padded * layout.hidden_size)]).to(layout.dtype).view(padded, -1)
              for _ in range(layout.num_aux + 1)]  # fmt: skip
    *aux, last = (state.to(device) for state in states)
    return StepTrace(
        request_ids=[f"r{i}" for i in rng.sample(range(4), count)],
        lengths=lengths,
        num_drafts=drafts,
        emits=[rng.random() < 0.8 for _ in drafts],
        token_ids=_integers(rng, padded, device)[:padded],
        positions=_integers(rng, padded, device)[:total],
        aux_hidden_states=aux,
        last_hidden_states=last,
        sampled=sampled,
        draft_version=rng.randint(1, 9),
    )


def _integers(rng: random.Random, count: int, device: str) -> torch.Tensor:
    values = [rng.randrange(2**31) for _ in range(2 * count + 1)]
    tensor = torch.tensor(values, dtype=rng.choice((torch.int32, torch.int64)), device=device)
    return rng.choice((tensor, tensor[1:], tensor[::2]))


def _laid_out(rng: random.Random, values: torch.Tensor) -> torch.Tensor:
    """The same numbers, in memory one way or another."""
    wide = torch.full((values.shape[0], 2 * values.shape[1] + 1), 77, dtype=values.dtype)
    kind = rng.randrange(4)
    if kind == 0:
        return values
    if kind == 1:
        return values.T.contiguous().T
    place = wide[:, 1 : 1 + values.shape[1]] if kind == 2 else wide[:, 1::2]
    return place.copy_(values)
