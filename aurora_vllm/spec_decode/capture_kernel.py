"""One Triton kernel that writes a step's rows: what the host says, what the device adds, and the hidden states.

What the host knows goes up in one piece, int64::

    addresses and strides of the step's tensors | words of each row, int32 [n, 16]

Two of a row's words, which the device overwrites, tell it where to look: POSITION the row of the batch, TOKEN the
place of its request. Addresses go up rather than being arguments because any number of states may
come, and because Triton looks at each argument anew at every launch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import triton
import triton.language as tl

from aurora_vllm.spec_decode.row_fill import KnownRows, TorchFill
from aurora_vllm.spec_decode.upload import upload
from aurora_vllm.transport.rows import META_WORDS, Field, RowLayout

if TYPE_CHECKING:
    from aurora_vllm.spec_decode.trace import StepTrace

logger = logging.getLogger("vllm.aurora")

# Places of the head, in int64. An address and what to multiply by come one after the other, in words of int32.
TOKENS = tl.constexpr(0)
POSITIONS = tl.constexpr(2)
SAMPLED = tl.constexpr(4)  # and two strides
STATES = tl.constexpr(7)

WORDS = tl.constexpr(META_WORDS)
FLAGS = tl.constexpr(int(Field.FLAGS))
POSITION = tl.constexpr(int(Field.POSITION))
TOKEN = tl.constexpr(int(Field.TOKEN))
DRAFT_INDEX = tl.constexpr(int(Field.DRAFT_INDEX))
EMITTED = tl.constexpr(int(Field.EMITTED))

MOST_AT_ONCE = 2048  # words of a state that a program copies in one go: four times 16 bytes for each of its threads
ALIGNED = 16  # bytes
INTEGERS = (torch.int32, torch.int64)


# Nothing is specialized on: a kernel would be compiled while requests wait. How states lie, the host has looked at.
@triton.jit(do_not_specialize=["rows_ptr", "step_ptr", "first"])
def capture_kernel(
    rows_ptr,  # uint8 [k, ROW_BYTES], a reserved piece
    step_ptr,  # int64, as above
    first,  # row of the step that the piece begins with
    HEAD: tl.constexpr,  # length of the head
    ROW_BYTES: tl.constexpr,
    STATE_WORDS: tl.constexpr,
    WORD: tl.constexpr,  # integer type that states are copied in
    BLOCK: tl.constexpr,
):
    """Grid [k, states]: copy one state of one row; the first program of a row writes its metadata, too."""
    row = tl.program_id(0)
    column = tl.program_id(1)
    known = step_ptr.to(tl.pointer_type(tl.int32)) + 2 * HEAD + (first + row).to(tl.int64) * WORDS
    written = tl.multiple_of(rows_ptr + row.to(tl.int64) * ROW_BYTES, 16)
    source = tl.load(known + POSITION).to(tl.int64)
    if column == 0:
        tokens = tl.load(step_ptr + TOKENS).to(tl.pointer_type(tl.int32))
        token = tl.load(tokens + source * tl.load(step_ptr + TOKENS + 1))
        positions = tl.load(step_ptr + POSITIONS).to(tl.pointer_type(tl.int32))
        position = tl.load(positions + source * tl.load(step_ptr + POSITIONS + 1))
        owner = tl.load(known + TOKEN).to(tl.int64) * tl.load(step_ptr + SAMPLED + 1)
        place = (tl.load(known + DRAFT_INDEX) + 1).to(tl.int64) * tl.load(step_ptr + SAMPLED + 2)
        sampled = tl.load(step_ptr + SAMPLED).to(tl.pointer_type(tl.int32))
        emitted = tl.load(sampled + owner + place)
        emitted = tl.where(tl.load(known + EMITTED) < 0, -1, emitted)
        flags = tl.where(emitted < 0, tl.load(known + FLAGS), 0)
        word = tl.arange(0, WORDS)
        words = tl.load(known + word)
        words = tl.where(word == FLAGS, flags, words)
        words = tl.where(word == POSITION, position, words)
        words = tl.where(word == TOKEN, token, words)
        words = tl.where(word == EMITTED, emitted, words)
        tl.store(written.to(tl.pointer_type(tl.int32)) + word, words)
    state = tl.load(step_ptr + STATES + column).to(tl.pointer_type(WORD))
    state = tl.multiple_of(state, 16) + source * STATE_WORDS
    copy = (written + 4 * WORDS).to(tl.pointer_type(WORD)) + column.to(tl.int64) * STATE_WORDS
    for start in range(0, STATE_WORDS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < STATE_WORDS
        tl.store(copy + at, tl.load(state + at, mask=inside), mask=inside)


COMPILED = isinstance(capture_kernel, triton.JITFunction)  # else interpreted, which reads the host's memory only


class KernelFill:
    """By one launch for each reserved piece, which is one a step but where the ring wraps.

    A step whose tensors are not as vLLM makes them goes torch's way: on a device a wrong address ends the process.
    """

    name: ClassVar[str] = "one kernel"
    _said = False

    def __init__(self, layout: RowLayout) -> None:
        self._layout, self._torch = layout, TorchFill(layout)
        self._states = layout.num_aux + 1
        self._head = -(-(STATES.value + self._states) // 8) * 8  # so that the words begin at a multiple of 64 bytes
        state_bytes = layout.hidden_size * layout.dtype.itemsize
        width = next(width for width in (4, 2, 1) if state_bytes % width == 0)
        words = state_bytes // width
        self._constants: dict[str, Any] = {
            "HEAD": self._head,
            "ROW_BYTES": layout.row_bytes,
            "STATE_WORDS": words,
            "WORD": {4: tl.int32, 2: tl.int16, 1: tl.int8}[width],
            "BLOCK": min(MOST_AT_ONCE, 1 << (words - 1).bit_length()),
        }

    def __call__(self, views: Sequence[torch.Tensor], trace: StepTrace, known: KnownRows) -> None:
        head = self._describe(views[0], trace, known)
        if head is None:
            if not self._said:
                logger.warning("aurora: a step's tensors are not as expected; its rows are written by torch, slower")
            self._said = True
            self._torch(views, trace, known)
            return
        count = len(known.words)
        step = np.empty(self._head + count * META_WORDS // 2, dtype=np.int64)
        step[: len(head)] = head
        words = step[self._head :].view(np.int32).reshape(count, META_WORDS)
        words[:] = known.words
        words[:, POSITION.value] = np.arange(count) if known.taken is None else known.taken
        words[:, TOKEN.value] = known.owners
        told = upload(step, trace.token_ids.device)
        first = 0
        for view in views:
            capture_kernel[(view.shape[0], self._states)](view, told, first, **self._constants)
            first += view.shape[0]

    def _describe(self, view: torch.Tensor, trace: StepTrace, known: KnownRows) -> list[int] | None:
        """The head for these tensors; None where the kernel cannot read them, or not write to where the view lies.

        Plain loops: all of this is the host's time, in each step.
        """
        device, dtype, hidden = view.device, self._layout.dtype, self._layout.hidden_size
        last = len(known.words) - 1 if known.taken is None else int(known.taken[-1])  # row of the batch
        head, addresses = [], []
        for tensor, at in ((trace.token_ids, last), (trace.positions, last), (trace.sampled, int(known.owners[-1]))):
            if tensor.dtype not in INTEGERS or tensor.device != device or tensor.shape[0] <= at:
                return None
            words = tensor.itemsize // 4  # of an int64 the lower half is read, which is the number
            head.append(tensor.data_ptr())
            for stride in tensor.stride():
                head.append(stride * words)
        unaligned = view.data_ptr()
        for state in (*trace.aux_hidden_states, trace.last_hidden_states):
            rows, width = state.shape
            if state.dtype != dtype or state.device != device or rows <= last or width != hidden:
                return None
            if not state.is_contiguous():
                return None
            address = state.data_ptr()
            unaligned |= address
            addresses.append(address)
        fits = len(head) == STATES.value and trace.sampled.dim() == 2 and len(addresses) == self._states
        return head + addresses if fits and not unaligned % ALIGNED else None
