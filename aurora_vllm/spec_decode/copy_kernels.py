"""Triton kernels that look up, on the device, what was said before: copied proposals for vLLM's V2 runner.

A table maps the hash of n tokens of context to the token that followed them last, for a few n, as context-mixing
compressors do (PPM; Cleary and Witten, 1984). One word holds check and token, so whoever reads beside a writer sees one
entry or the other::

    word = check of the hash << 32 | token

A request's own text is hashed together with a number of its own; answers go into a second table, which all may read,
without one. Proposing goes token by token: the longest context that is known says the next one, which becomes context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aurora_vllm.spec_decode.copy_tables import MOST_TOKENS

LONGEST = tl.constexpr(MOST_TOKENS)  # of a proposal, and of context
BLOCK = tl.constexpr(128)  # tokens that one program learns

# Columns of the table of requests, int64, one row for each of vLLM's slots. The host sets the first four when a request
# comes and the others to 0; those are the kernel's.
SALT = tl.constexpr(0)
LEARNED = tl.constexpr(1)  # tokens that are in the tables
ABILITIES = tl.constexpr(2)
PROMPT_LENGTH = tl.constexpr(3)
ORIGIN = tl.constexpr(4)  # who made the proposal that is verified next: 0 nobody, else 1 + copy_counts' origin
RIVAL_KIND = tl.constexpr(5)  # copy and draft both proposed a first token
RIVAL_COPY = tl.constexpr(6)
RIVAL_DRAFT = tl.constexpr(7)
STEPS = tl.constexpr(8)  # since the request came
SIMULATED_KIND = tl.constexpr(9)  # a copy that is compared with what is emitted, whether or not it is verified; 0: none
SIMULATED_AT = tl.constexpr(10)
SIMULATED = tl.constexpr(11)  # its tokens: LONGEST columns
COLUMNS = tl.constexpr(19)

LEAVES = tl.constexpr(1)  # bits of ABILITIES: others may copy its answer
TAKES = tl.constexpr(2)  # it may copy theirs
IS_SAMPLED = tl.constexpr(4)  # temperature above 0


# Where a mask depends on a scalar, the scalar moves a bound: Triton's interpreter, in which the tests run this, makes
# integers of a vector's and a scalar's conjunction, and takes no integers for a mask.


@triton.jit
def _mix(token, back):
    """A token's part in the hash of a context where it stands ``back`` tokens before the end."""
    x = (token + (back << 32)) * 0x2545F4914F6CDD1D
    x = x ^ (x >> 29)
    return x * 0x369DEA0F31A53F85


@triton.jit
def _entry(mixed, salt, MASK: tl.constexpr):
    """Where a context's word lies, and its check. Of 30 bits: a wrong match costs a wrong draft, nothing else."""
    x = mixed ^ (salt * 0x1CE4E5B9BF58476D)
    x = x ^ (x >> 32)
    x = x * 0x2545F4914F6CDD1D
    x = x ^ (x >> 30)
    return x & MASK, ((x >> 33) & 0x3FFFFFFF) | 0x40000000


@triton.jit
def learn_kernel(
    tokens_ptr,  # int32 [slots, stride]: vLLM's all_token_ids
    tokens_stride,
    slots_ptr,  # int64 [R]: vLLM's idx_mapping
    total_len_ptr,  # int32 [slots]
    num_sampled_ptr,  # int32 [R]
    requests_ptr,  # int64 [slots, COLUMNS]
    own_ptr,  # int64 [OWN_MASK + 1]
    others_ptr,  # int64 [OTHERS_MASK + 1]
    ORDERS: tl.constexpr,  # (0, n, ...), ascending
    NUM_ORDERS: tl.constexpr,
    OWN_MASK: tl.constexpr,
    OTHERS_MASK: tl.constexpr,
    VOCABULARY: tl.constexpr,
):
    """Grid [R, blocks]: put what each request gained since it was last looked at into the tables."""
    row = tl.program_id(0)
    if tl.load(num_sampled_ptr + row) == 0:  # inside its prompt
        return
    slot = tl.load(slots_ptr + row).to(tl.int64)
    request = requests_ptr + slot * COLUMNS
    salt = tl.load(request + SALT)
    leaves = (tl.load(request + ABILITIES) & LEAVES) != 0
    answer = tl.where(leaves, tl.load(request + PROMPT_LENGTH), 1 << 40)  # others learn only from there on
    total = tl.load(total_len_ptr + slot).to(tl.int64)
    text = tokens_ptr + slot * tokens_stride
    position = tl.load(request + LEARNED) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = position < total
    token = tl.load(text + position, mask=there, other=0).to(tl.int64)
    there = there & (token >= 0) & (token < VOCABULARY)  # what stands for an image may be no token
    mixed = tl.zeros([BLOCK], tl.int64)
    for i in tl.static_range(NUM_ORDERS):
        for back in tl.static_range(ORDERS[i] + 1, ORDERS[i + 1] + 1):
            before = tl.load(text + position - back, mask=there & (position >= back), other=0)
            mixed += _mix(before.to(tl.int64), back)
        place, check = _entry(mixed, salt, OWN_MASK)
        tl.store(own_ptr + place, (check << 32) | token, mask=there & (position >= ORDERS[i + 1]))
        place, check = _entry(mixed, 0, OTHERS_MASK)
        tl.store(others_ptr + place, (check << 32) | token, mask=there & (position >= answer + ORDERS[i + 1]))


@triton.jit
def _count_outcomes(
    text,
    total,
    sampled,
    rejected,
    request,
    counts_ptr,
    COMPARED: tl.constexpr,
    RIGHT: tl.constexpr,
    VERDICTS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """What this step's tokens say of the proposals before. Returns the kind of the copy still being simulated, or 0.

    In what order counts grow is nobody's business: a stronger atomic would have each program wait for its stores.
    """
    verified = sampled + rejected - 1
    origin = tl.load(request + ORIGIN)
    verdict = VERDICTS + ((origin - 1) * (POSITIONS + 1) + verified) * (POSITIONS + 1) + sampled - 1
    judged = (origin > 0) & (verified > 0) & (verified <= POSITIONS)
    tl.atomic_add(counts_ptr + verdict, 1, mask=judged, sem="relaxed")

    emitted = tl.load(text + total - sampled).to(tl.int64)
    kind = tl.load(request + RIVAL_KIND)
    copy_right = (tl.load(request + RIVAL_COPY) == emitted).to(tl.int64)
    draft_right = (tl.load(request + RIVAL_DRAFT) == emitted).to(tl.int64)
    tl.atomic_add(counts_ptr + COMPARED + kind * 4 + 2 * copy_right + draft_right, 1, mask=kind > 0, sem="relaxed")

    at = tl.load(request + SIMULATED_AT)
    kind = tl.load(request + SIMULATED_KIND)
    i = tl.arange(0, LONGEST)
    copied = tl.load(request + SIMULATED + i)
    known = tl.where(kind > 0, total - at, 0)
    actual = tl.load(text + at + i, mask=i < known, other=-2).to(tl.int64)
    right = tl.min(tl.where((copied == actual) & (i < POSITIONS), POSITIONS, i))
    going_on = (right < POSITIONS) & (right == known)
    over = (kind > 0) & (going_on == 0)
    tl.atomic_add(counts_ptr + RIGHT + kind * (POSITIONS + 1) + right, 1, mask=over, sem="relaxed")
    return tl.where(going_on, kind, 0)


# What may change from step to step is not specialized on: a kernel would be compiled while requests wait.
@triton.jit(do_not_specialize=["drafts_stride", "length", "drafted_by", "preferred"])
def propose_kernel(
    tokens_ptr,  # int32 [slots, stride]
    tokens_stride,
    slots_ptr,  # int64 [R]
    total_len_ptr,  # int32 [slots]
    num_sampled_ptr,  # int32 [R]
    num_rejected_ptr,  # int32 [R]
    drafts_ptr,  # int64 [R, drafts_stride], read and written
    drafts_stride,
    requests_ptr,  # int64 [slots, COLUMNS]
    own_ptr,
    others_ptr,
    counts_ptr,  # int64, laid out by control/copy_counts.py
    length,  # tokens that the next step verifies; 0: none
    drafted_by,  # 1 + copy_counts' origin of the draft whose proposals stand in drafts; 0: it did not run
    preferred,  # bit of each kind of copy that is to be proposed in the draft's stead
    ORDERS: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    OWN_MASK: tl.constexpr,
    OTHERS_MASK: tl.constexpr,
    POSITIONS: tl.constexpr,
    COMPARED: tl.constexpr,
    RIGHT: tl.constexpr,
    VERDICTS: tl.constexpr,
    COPIED: tl.constexpr,
):
    """Grid [R]: count what came of the proposals before, look up a copy, and propose it where it is preferred."""
    row = tl.program_id(0)
    sampled = tl.load(num_sampled_ptr + row).to(tl.int64)
    if sampled == 0:
        return
    slot = tl.load(slots_ptr + row).to(tl.int64)
    request = requests_ptr + slot * COLUMNS
    text = tokens_ptr + slot * tokens_stride
    total = tl.load(total_len_ptr + slot).to(tl.int64)
    salt = tl.load(request + SALT)
    abilities = tl.load(request + ABILITIES)
    rejected = tl.load(num_rejected_ptr + row).to(tl.int64)
    simulated = _count_outcomes(
        text, total, sampled, rejected, request, counts_ptr, COMPARED, RIGHT, VERDICTS, POSITIONS
    )

    # The newest tokens and, behind them, the copied ones, which are context of those after them.
    at = tl.arange(0, 2 * LONGEST) - LONGEST
    window = tl.load(text + total + at, mask=(at < 0) & (total + at >= 0), other=0).to(tl.int64)
    found = 0
    kind = tl.zeros([], tl.int64)
    for step in range(POSITIONS):
        back = step - at.to(tl.int64)
        mixed = _mix(window, back)
        best = tl.full([], -1, tl.int64)
        best_kind = tl.zeros([], tl.int64)
        for i in tl.static_range(NUM_ORDERS):
            inside = (back >= 1) & (back <= ORDERS[i + 1])
            context = tl.sum(tl.where(inside, mixed, 0))
            enough = total + step >= ORDERS[i + 1]
            place, check = _entry(context, 0, OTHERS_MASK)
            word = tl.load(others_ptr + place)
            match = enough & ((abilities & TAKES) != 0) & ((word >> 32) == check)
            best = tl.where(match, word & 0x7FFFFFFF, best)
            best_kind = tl.where(match, 1 + NUM_ORDERS + i, best_kind)
            place, check = _entry(context, salt, OWN_MASK)
            word = tl.load(own_ptr + place)
            match = enough & ((word >> 32) == check)
            best = tl.where(match, word & 0x7FFFFFFF, best)
            best_kind = tl.where(match, 1 + i, best_kind)
        goes_on = (best >= 0) & (found == step)
        window = tl.where(at == tl.where(goes_on, step, LONGEST), best, window)
        found += goes_on.to(tl.int32)
        kind = tl.where(step == 0, best_kind, kind)
    is_sampled = (abilities & IS_SAMPLED) != 0
    kind = tl.where(is_sampled & (kind > 0), kind + 2 * NUM_ORDERS, kind)
    tl.atomic_add(counts_ptr + kind, 1, sem="relaxed")

    proposal = drafts_ptr + row * drafts_stride + at
    asked = (at >= 0) & (at < length)
    # What nobody drafted has to be some token; as vLLM's own lookup does, it is the last one.
    last = tl.load(text + total - 1).to(tl.int64)
    draft = tl.where(drafted_by > 0, tl.load(proposal, mask=asked, other=0), last)
    takes_copy = (kind > 0) & (length > 0) & ((drafted_by == 0) | (((preferred >> kind) & 1) != 0))
    tl.store(proposal, tl.where(at < tl.where(takes_copy, found, 0), window, draft), mask=asked)

    drafter = tl.where((drafted_by > 0) & (length > 0), drafted_by, 0)
    tl.store(request + ORIGIN, tl.where(takes_copy, 1 + COPIED, drafter).to(tl.int64))
    tl.store(request + RIVAL_KIND, tl.where(drafter > 0, kind, 0))
    tl.store(request + RIVAL_COPY, tl.sum(tl.where(at == 0, window, 0)))
    tl.store(request + RIVAL_DRAFT, tl.sum(tl.where(at == 0, draft, 0)))
    # One of POSITIONS steps, whatever became of the last: it is over by then, since a step gains a token at least. If
    # the next one began as soon as it is over, right ones, which last longer, would be counted too seldom.
    steps = tl.load(request + STEPS)
    begins = (steps + salt) % POSITIONS == 0
    tl.store(request + STEPS, steps + 1)
    tl.store(request + SIMULATED_KIND, tl.where(begins, kind, simulated))
    tl.store(request + SIMULATED_AT, total, mask=begins)
    tl.store(request + SIMULATED + at, tl.where(at < found, window, -1), mask=at >= tl.where(begins, 0, LONGEST))
    tl.store(request + LEARNED, total)
