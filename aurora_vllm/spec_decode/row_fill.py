"""Fills the rows of a step in the ring, by torch's operators, which work everywhere.

On a GPU these take a dozen launches a step; :mod:`.capture_kernel` has the same interface and takes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_vllm.spec_decode.upload import upload
from aurora_vllm.transport.rows import Field, RowLayout

if TYPE_CHECKING:
    from aurora_vllm.spec_decode.trace import StepTrace

# Plain integers: indexing with a member of an IntEnum costs a method call each time.
_FLAGS, _POSITION, _TOKEN, _DRAFT_INDEX, _EMITTED = (
    int(word) for word in (Field.FLAGS, Field.POSITION, Field.TOKEN, Field.DRAFT_INDEX, Field.EMITTED)
)


@dataclass(frozen=True)
class KnownRows:
    """What the host knows before the verdict about the n rows of a step."""

    words: NDArray[np.int32]  # [n, 16] from OpenRequest.rows, with step and draft version
    owners: NDArray[np.int64]  # [n] index of each row's request in the batch
    taken: NDArray[np.int64] | None  # [n] indices of the rows in the batch; None: its first n, in order


class RowFill(Protocol):
    """A way to fill rows."""

    name: ClassVar[str]

    def __call__(self, views: Sequence[torch.Tensor], trace: StepTrace, known: KnownRows) -> None:
        """Enqueue all n rows. views: uint8 [k, row_bytes] each, whose k add up to n. The padding is left as it is."""


class TorchFill:
    """By torch's operators."""

    name: ClassVar[str] = "torch"

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout

    def __call__(self, views: Sequence[torch.Tensor], trace: StepTrace, known: KnownRows) -> None:
        taken = None if known.taken is None else upload(known.taken, trace.token_ids.device)
        meta = self._meta(trace, known, taken)
        start = 0
        for view in views:
            rows = slice(start, start + view.shape[0])
            self._layout.meta(view).copy_(meta[rows])
            take = rows if taken is None else taken[rows]
            # One after the other: gathered in one piece they would take hundreds of MB of a GPU in a step with a long
            # prompt.
            columns = self._layout.states(view).split(self._layout.hidden_size, dim=1)
            for column, state in zip(columns, (*trace.aux_hidden_states, trace.last_hidden_states), strict=True):
                column.copy_(state[take])
            start = rows.stop

    def _meta(self, trace: StepTrace, known: KnownRows, taken: torch.Tensor | None) -> torch.Tensor:
        """Metadata words of every row. int32 [n, 16], on the trace's device.

        The device adds three words: position, token, and the emitted token, for which ``sampled`` has -1 after the
        first rejected draft token.
        """
        device = trace.token_ids.device
        places = known.owners * trace.sampled.shape[1] + known.words[:, _DRAFT_INDEX] + 1
        silent = bool((known.words[:, _EMITTED] < 0).any())
        meta = upload(known.words, device)
        emitted = trace.sampled.take(upload(places, device))
        if silent:
            emitted.masked_fill_(meta[:, _EMITTED] < 0, -1)
        if any(trace.num_drafts):
            meta[:, _FLAGS].mul_(emitted < 0)  # in place: an assignment would copy it onto itself
        take = slice(len(places)) if taken is None else taken
        meta[:, _POSITION] = trace.positions[take]
        meta[:, _TOKEN] = trace.token_ids[take]
        meta[:, _EMITTED] = emitted
        return meta
