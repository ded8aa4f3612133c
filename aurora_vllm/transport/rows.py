"""The fixed-width row: one position of one request as the target computed it.

A row is what the worker knows about one position after one forward pass of the target. All of it, metadata included,
is in the row itself, so that on a GPU device kernels can write the whole record without a verdict from the host.

Layout, in bytes: ``int32 meta[16]`` | aux hidden states ``dtype [num_aux * H]`` | last hidden state ``dtype [H]`` |
padding to 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch

META_WORDS = 16
ALIGNMENT = 64
LARGEST_STEP = 8192  # rows of a step where vLLM gives none: its max_num_batched_tokens on a GPU of 70 GB or more


class Field(IntEnum):
    """Index of each metadata word (int32) in a row."""

    REQUEST_LOW = 0  # a random 62-bit number for each request; never an id that the client chose
    REQUEST_HIGH = 1
    FLAGS = 2  # RowFlag
    POSITION = 3  # position of TOKEN in the sequence, from 0
    TOKEN = 4  # the token the target read at POSITION
    STEP = 5  # number of the engine step that wrote the row
    DRAFT_INDEX = 6  # 0..K-1 where TOKEN is a draft token under verification, else -1
    NUM_DRAFTS = 7  # draft tokens verified for this request in this step; those without REJECTED were accepted
    EMITTED = 8  # the token the target chose after POSITION; -1 where it chose none (inside a prompt, rejected rows)
    DRAFT_VERSION = 9  # version of the draft weights that proposed this step's drafts
    PROMPT_LENGTH = 10  # tokens of the prompt; tokens below this position were not chosen by the target
    TEMPERATURE_MILLI = 11  # request temperature x 1000; 0 is greedy


class RowFlag(IntFlag):
    """What a row is."""

    NONE = 0
    REJECTED = 1  # from the first rejected draft token on: a branch, not the accepted path
    END = 2  # the request is over; such a row has no payload and no position
    DROPPED = 4  # with END: rows are missing, so the request must not be used


@dataclass(frozen=True)
class RowLayout:
    """Offsets in a row.

    Args:
        hidden_size: H, the target's hidden size.
        num_aux: number of auxiliary hidden states (EAGLE-3 takes three).
        dtype: torch dtype of the hidden states, the target's own.
    """

    hidden_size: int
    num_aux: int
    dtype: torch.dtype

    @property
    def aux_width(self) -> int:
        """Elements of the concatenated auxiliary states."""
        return self.num_aux * self.hidden_size

    @property
    def payload_bytes(self) -> int:
        """Bytes of a row's states."""
        return (self.aux_width + self.hidden_size) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: metadata, states and padding."""
        unpadded = META_WORDS * 4 + self.payload_bytes
        return -(-unpadded // ALIGNMENT) * ALIGNMENT

    def meta(self, rows: torch.Tensor) -> torch.Tensor:
        """View of the metadata. rows: uint8 [n, row_bytes] -> int32 [n, 16], sharing memory."""
        return rows[:, : META_WORDS * 4].view(torch.int32)

    def aux(self, rows: torch.Tensor) -> torch.Tensor:
        """View of the auxiliary states. rows: uint8 [n, row_bytes] -> dtype [n, num_aux * H]."""
        start = META_WORDS * 4
        return rows[:, start : start + self.aux_width * self.dtype.itemsize].view(self.dtype)

    def last(self, rows: torch.Tensor) -> torch.Tensor:
        """View of the last hidden state. rows: uint8 [n, row_bytes] -> dtype [n, H]."""
        start = META_WORDS * 4 + self.aux_width * self.dtype.itemsize
        return rows[:, start : start + self.hidden_size * self.dtype.itemsize].view(self.dtype)

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """View of the auxiliary states followed by the last one. rows: uint8 [n, row_bytes] -> dtype
        [n, (num_aux + 1) * H]."""
        start = META_WORDS * 4
        return rows[:, start : start + self.payload_bytes].view(self.dtype)
