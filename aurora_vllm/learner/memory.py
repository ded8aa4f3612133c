"""What the learner process will take at its peak, worked out before it starts.

The peak is in a training step on the longest trajectory, with the replay full, while the loss holds the logits of a
chunk of rows: all of the unroll's activations are alive then, and so are the gradients of the step before. In bytes:

    weights    7 P floats: incumbent, candidate, the draft in training, the one that a trial set aside, two moments,
               gradients; an embedding of the draft's own is there four times
    target     embedding and lm_head as stored (mapped from the file, and touched all over)
    rows       the target's lm_head on the draft vocabulary, in the dtype of products
    replay     its budget
    step       R rows x (inputs + K x what a step keeps for the backward pass) + D x (gradient and logits of a chunk),
               and the allocator's slack; or what a lesson takes at most, where that is more: three matrices of its
               unknowns
    process    Python and torch with what an optimizer imports, and river, which is there once the learner has slept:
               measured

R is the longest trajectory or the wanted batch, whatever is more. Shared memory (ring, bank) is not counted: it is the
server's. Nor is what comes on top when traffic comes faster than it is looked at (open requests, and a few
trajectories to be scored), nor the discard term. In the first steps after a lesson only lm_head is trained, and
the body's gradients and moments are not there yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from aurora_vllm.learner import lesson_shape
from aurora_vllm.learner.divergence import CHUNK
from aurora_vllm.transport.bank_layout import aligned
from aurora_vllm.transport.cuda import GRANULE

MIB = 2**20
# Measured with SmolLM2-135M (torch 2.13, CPU build; D 4608 and 8192, R 128 to 2048, replay 96 to 192 MiB): with these
# two the prediction is within 5 % of VmHWM less shared memory. 390 MiB of the first are there after one optimizer step.
PROCESS_BYTES = (460 + 65) * MIB  # the latter for river and the scipy it brings
# Of a second process on a GPU: context, cuBLAS and its workspaces. ASSUMED (a context alone is known to take some 400
# to 600 MiB on cards of 80 GB), not measured here.
CONTEXT_BYTES = 768 * MIB
SLACK = 1.25  # of a step: pieces differ in size from those freed before, and seldom fit where they were


@dataclass(frozen=True)
class DraftSizes:
    """What decides how much a draft of one layer takes. Shapes as in its checkpoint."""

    parameters: int  # P, without an embedding
    hidden: int  # H
    query: int  # width of q
    key: int  # width of k, and of v
    inner: int  # of the MLP
    vocabulary: int  # D
    aux_width: int  # of fc's input: num_aux * target's hidden size
    target_hidden: int
    embedding: int = 0  # parameters of an embedding of its own

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], parameters: int, target_hidden: int, embedding: int = 0
    ) -> DraftSizes:
        """From the shapes of a checkpoint's tensors, by name."""
        hidden, aux_width = shapes["fc.weight"]
        return cls(
            parameters=parameters,
            hidden=hidden,
            query=shapes["midlayer.self_attn.q_proj.weight"][0],
            key=shapes["midlayer.self_attn.k_proj.weight"][0],
            inner=shapes["midlayer.mlp.gate_proj.weight"][0],
            vocabulary=shapes["lm_head.weight"][0],
            aux_width=aux_width,
            target_hidden=target_hidden,
            embedding=embedding,
        )


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes at the peak, by what they are for; see the module's text."""

    process: int
    target: int
    weights: int
    rows: int
    replay: int
    step: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on the target's GPU, beside vLLM's own, where ring, bank and learner lie there. See :func:`predict_gpu`."""

    ring: int
    bank: int
    swap: int  # the worker's copies of the draft
    copies: int  # what was said before, for copied proposals
    logits: int  # of proposals that vLLM verifies and does not measure beforehand
    context: int
    target: int
    weights: int
    rows: int
    step: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def learner(self) -> int:
        """What the learner allocates through torch."""
        return self.target + self.weights + self.rows + self.step


def predict_gpu(
    draft: DraftSizes,
    target_bytes: int,
    rows: int,
    ttt_length: int,
    ring_bytes: int,
    weights_bytes: int,
    copies_bytes: int = 0,
    logits_bytes: int = 0,
) -> GpuMemory:
    """What Aurora takes on a GPU. Never compared with one: docs/gpu.md.

    ``target``, ``weights``, ``rows`` and ``step`` are the learner's, as in :class:`LearnerMemory`; its replay, its
    process and its lessons lie on the host.

    Args:
        target_bytes, rows, ttt_length: as in :func:`predict`. The step is the dearer of one in float32 and one in
            bfloat16.
        ring_bytes: of the ring's rows.
        weights_bytes: of the bank's three slots. A running swap has as much again in the worker: what is live, what
            was live before, and what is being staged.
        copies_bytes: of the worker's tables of what was said before.
        logits_bytes: of the most tokens that a step verifies, less one of every request, which vLLM measures.
    """
    return GpuMemory(
        ring=aligned(ring_bytes, GRANULE),
        bank=aligned(weights_bytes, GRANULE),
        swap=weights_bytes,
        copies=copies_bytes,
        logits=logits_bytes,
        context=CONTEXT_BYTES,
        target=target_bytes,
        weights=_weights_bytes(draft),
        rows=4 * draft.vocabulary * draft.target_hidden,
        step=max(_step_bytes(draft, rows, ttt_length, bfloat16) for bfloat16 in (False, True)),
    )


def predict(
    draft: DraftSizes, target_bytes: int, replay_bytes: int, rows: int, ttt_length: int, bfloat16: bool
) -> LearnerMemory:
    """The learner's peak.

    Args:
        target_bytes: of the target's embedding and lm_head as stored; of one of them where tied.
        replay_bytes: budget of the replay.
        rows: R, of the largest batch.
        ttt_length: K.
        bfloat16: whether products are in bfloat16 (``train.fast_matmul_dtype``). Their inputs are then kept a second
            time, as copies of half the size, their outputs are half as large, and so is a copy of the weights.
    """
    return LearnerMemory(
        process=PROCESS_BYTES,
        target=target_bytes,
        weights=_weights_bytes(draft),
        rows=(2 if bfloat16 else 4) * draft.vocabulary * draft.target_hidden,
        replay=replay_bytes,
        step=max(_lesson_bytes(draft), _step_bytes(draft, rows, ttt_length, bfloat16)),
    )


def _weights_bytes(draft: DraftSizes) -> int:
    return 4 * (7 * draft.parameters + 4 * draft.embedding)


def _step_bytes(draft: DraftSizes, rows: int, ttt_length: int, bfloat16: bool) -> int:
    out, copy = (2, 2) if bfloat16 else (4, 0)  # bytes of a product's output, and of the copy of an input
    hidden, key_rows = draft.hidden, draft.key
    inputs = 4 * (
        draft.aux_width + 2 * draft.target_hidden
    )  # batch; the target's states again, for the rows that count
    inputs += (4 + copy) * draft.aux_width + (12 + 3 * copy) * hidden + out * (draft.query + 2 * key_rows)
    kept = (28 + 5 * copy) * hidden  # norms, residuals, the output before and after the final norm, its gradient
    kept += (8 + out + copy) * draft.query + (8 + 2 * out) * key_rows + 4 * out * draft.inner
    head = hidden * (12 if bfloat16 else 4) + CHUNK * (8 + (4 + out) * ttt_length)
    body_copy = copy * (draft.parameters - draft.vocabulary * hidden)
    return int(SLACK * (rows * (inputs + ttt_length * kept) + draft.vocabulary * head + body_copy))


def _lesson_bytes(draft: DraftSizes) -> int:
    """At most: normal equations, what is left of them to solve, and a round's own (learner/normal_equations.py keeps
    none of them as one whole matrix, so it is less); 0 where no lesson is given."""
    heads = draft.key  # of one channel: only their width matters here
    return 3 * 4 * lesson_shape.unknowns(draft.hidden, heads, 1, draft.aux_width // draft.hidden) ** 2
