"""Predicts the learner's peak memory before it starts.

The peak is in a training step on the longest trajectory, with a full replay, while the loss holds the logits of a chunk
of rows: then all activations of the unroll are alive, and the gradients of the previous step. In bytes:

    weights    7 P floats: incumbent, candidate, the draft in training, the one set aside by a trial, two moments,
               gradients; the draft's own embedding, if any, four times
    target     embedding and lm_head as stored (mapped from the file, and read completely)
    rows       the target's lm_head on the draft vocabulary, in the dtype of products
    replay     its budget
    step       R rows x (inputs + K x what a step keeps for the backward pass) + D x (gradient and logits of a chunk),
               and the allocator's slack; or, if that is more, the most that a lesson takes: three matrices of its
               unknowns
    process    measured: Python, torch with the imports of an optimizer, and river, which is imported at the first sleep

R is the larger of the longest trajectory and the batch size. Not counted: shared memory (ring, bank), which is the
server's; open requests and a few unscored trajectories, if traffic comes faster than it is processed; the discard term.
In the first steps after a lesson only lm_head is trained, so the body's gradients and moments do not exist yet.
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
# two the prediction is within 5 % of VmHWM less shared memory, if requests are of one length. With mixed lengths the
# peak is up to 38 % higher (docs/decisions.md). 390 MiB of the first are used after one optimizer step.
PROCESS_BYTES = (460 + 65) * MIB  # the latter for river and scipy
# Of a second process on a GPU: context, cuBLAS and its workspaces. ASSUMED, not measured (a context alone is known to
# take 400 to 600 MiB on cards of 80 GB).
CONTEXT_BYTES = 768 * MIB
SLACK = 1.25  # of a step: allocations seldom fit into the gaps that earlier ones of other sizes left


@dataclass(frozen=True)
class DraftSizes:
    """The sizes that determine the memory of a draft of one layer."""

    parameters: int  # P, without an embedding
    hidden: int  # H
    query: int  # width of q
    key: int  # width of k, and of v
    inner: int  # width of the MLP
    vocabulary: int  # D
    aux_width: int  # width of fc's input: num_aux * target's hidden size
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
    """Bytes at the peak, by purpose; see the module's docstring."""

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
    """Bytes on the target's GPU, besides vLLM's own, if ring, bank and learner are there. See :func:`predict_gpu`."""

    ring: int
    bank: int
    swap: int  # the worker's copies of the draft
    copies: int  # tables for copied proposals
    logits: int  # of proposed tokens, which vLLM's memory profiling does not cover
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
    """What Aurora takes on a GPU. Never compared with a real one: docs/gpu.md.

    ``target``, ``weights``, ``rows`` and ``step`` are the learner's, as in :class:`LearnerMemory`; its replay, its
    process and its lessons lie on the host.

    Args:
        target_bytes, rows, ttt_length: as in :func:`predict`. The step is the larger of one in float32 and one in
            bfloat16.
        ring_bytes: of the ring's rows.
        weights_bytes: of the bank's three slots. A swap takes as much again in the worker: live, previous and staged
            weights.
        copies_bytes: of the worker's tables for copies.
        logits_bytes: of the most tokens that a step verifies, less one per request, which vLLM measures itself.
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
        target_bytes: of the target's embedding and lm_head as stored; of one of them if they are tied.
        replay_bytes: budget of the replay.
        rows: R, of the largest batch.
        ttt_length: K.
        bfloat16: whether products are in bfloat16 (``train.fast_matmul_dtype``). Their inputs are then kept a second
            time, as copies of half the size; their outputs are half as large, and there is such a copy of the weights.
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
    """An upper bound: normal equations, what is left of them to solve, and one round's (normal_equations.py stores none
    of them as one full matrix, so they take less); 0 if no lesson is given."""
    heads = draft.key  # of one channel: only their width matters here
    return 3 * 4 * lesson_shape.unknowns(draft.hidden, heads, 1, draft.aux_width // draft.hidden) ** 2
