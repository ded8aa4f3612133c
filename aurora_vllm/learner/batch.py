"""A batch of trajectories, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from aurora_vllm.learner.trajectory import Branch, Trajectory


@dataclass
class Batch:
    """B sequences of at most T rows. Row t holds the token at its position and the target's states *at* that token."""

    input_ids: torch.Tensor  # int64 [B, T], 0 on padding; not shifted
    aux: torch.Tensor  # float32 [B, T, num_aux * H]
    last: torch.Tensor  # float32 [B, T, H]: after the target's final norm, what its lm_head reads; 0 on padding
    attention_mask: torch.Tensor  # bool [B, T]: real rows, all before the padding
    loss_mask: torch.Tensor  # bool [B, T]: completion rows (position >= prompt length)
    positions: torch.Tensor  # int64 [B, T], counting up by one
    # int64 [B, T]: the target's argmax over its full vocabulary; -1 where the loss has to compute it.
    target_argmax: torch.Tensor | None = None
    # int64 [B, T]: the token the target emitted after each row; -1 where it emitted none (inside a prompt) or the token
    # is not known.
    emitted: torch.Tensor | None = None
    branches: list[list[Branch]] = field(default_factory=list)  # of each sequence; empty where they are not kept


def collate(trajectories: Sequence[Trajectory], device: torch.device | None = None) -> Batch:
    """Put trajectories into one batch, on a device (by default the CPU; branches are not moved).

    For a greedy request the target's argmax is the next token, which saves the loss a product with the whole lm_head.
    (If a penalty or a grammar made a greedy target emit another token, a draft should propose that one.)

    Raises:
        ValueError: there is no trajectory, or an empty one.
    """
    if not trajectories or any(len(one.token_ids) == 0 for one in trajectories):
        raise ValueError("a batch needs trajectories, and each needs rows")
    size, rows = len(trajectories), max(len(one.token_ids) for one in trajectories)
    first = trajectories[0]
    batch = Batch(
        input_ids=torch.zeros(size, rows, dtype=torch.int64),
        aux=torch.zeros(size, rows, first.aux.shape[-1]),
        last=torch.zeros(size, rows, first.last.shape[-1]),
        attention_mask=torch.zeros(size, rows, dtype=torch.bool),
        loss_mask=torch.zeros(size, rows, dtype=torch.bool),
        positions=torch.zeros(size, rows, dtype=torch.int64),
        target_argmax=torch.full((size, rows), -1, dtype=torch.int64),
        emitted=torch.full((size, rows), -1, dtype=torch.int64),
        branches=[one.branches for one in trajectories],
    )
    assert batch.target_argmax is not None and batch.emitted is not None
    for b, one in enumerate(trajectories):
        length = len(one.token_ids)
        batch.input_ids[b, :length] = one.token_ids
        batch.aux[b, :length] = one.aux
        batch.last[b, :length] = one.last
        batch.attention_mask[b, :length] = True
        batch.positions[b] = torch.arange(one.start, one.start + rows)
        batch.loss_mask[b, :length] = batch.positions[b, :length] >= one.prompt_length
        emitting = max(one.prompt_length - 1 - one.start, 0)  # the prompt's last row emits the first token
        batch.emitted[b, emitting : length - 1] = one.token_ids[emitting + 1 :]
        batch.emitted[b, length - 1] = one.next_token
        if one.temperature == 0:
            batch.target_argmax[b] = batch.emitted[b]
    return batch if device is None else _moved(batch, device)


def _moved(batch: Batch, device: torch.device) -> Batch:
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }
    return replace(batch, **moved)
