"""The self-check of copies: whether DeviceCopies proposes on this GPU what a model of it does, its cost, and whether
the host waits.

Needs Triton and numpy in addition to torch. With Triton's interpreter (``TRITON_INTERPRET``), "cpu" is also a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from aurora_vllm.control.copy_counts import NUM_KINDS, ORIGINS, CountsLayout
from aurora_vllm.spec_decode.request_states import request_states
from aurora_vllm.transport.cuda import tensor_over
from benchmarks.gpu_copies_model import Model
from benchmarks.gpu_timing import elapsed_us, host_waits, percentile

ANSWERS = 50_000  # tokens of answers that are kept for other requests
WORDS, WORD_TOKENS, PHRASES, PHRASE_WORDS = 20, 3, 24, 5  # texts consist of phrases, which share words
TOKENS = 150_000  # size of the vocabulary
DRAFT = TOKENS  # the first token that the draft proposes; no text contains the draft's tokens
EACH_VERSION = 10  # steps per version of the draft
ALL = (1 << NUM_KINDS) - 1  # bit mask: copies of all kinds are preferred to the draft
WARM = 5  # warm-up steps, not measured


class Decoding:
    """Requests that decode in vLLM's V2 runner, as far as copies are concerned. Their texts are known beforehand.

    Args:
        device: "cpu", or a CUDA device.
        requests: R, the number of requests; request i has vLLM's slot R - 1 - i.
        prompt: tokens of each prompt, at least as many as the longest context.
        positions: tokens of each proposal.
        steps: number of steps that can be made.
        arrives: [R], ascending, the step in which each prompt is completed; until then the request is in prefill.
        pinned: whether texts are in page-locked host memory, as in vLLM, instead of the device's.
    """

    def __init__(
        self,
        device: str,
        requests: int,
        prompt: int,
        positions: int,
        steps: int,
        arrives: Sequence[int] | None = None,
        pinned: bool = False,
    ) -> None:
        from aurora_vllm.spec_decode.device_copies import DeviceCopies  # without Triton the other sections still run

        self.device, self.positions, self.prompt, self.now = device, positions, prompt, -1
        self.counts: Sequence[int] | None = None  # as fetched last
        come, step = np.array(arrives or [0] * requests), np.arange(steps)[:, None]
        going_on = 1 + (step + np.arange(requests)) % (positions + 1)
        self.sampled = np.where(step > come, going_on, step == come)  # [steps, R]
        self.judged = step > come  # a proposal was verified
        self.totals = prompt + np.cumsum(self.sampled, axis=0)  # tokens of each text after a step
        self.salts = 1 + np.arange(requests)  # as DeviceCopies assigns them
        self.texts = _texts(requests, prompt + steps * (positions + 1))

        slots = np.arange(requests)[::-1].copy()
        tokens = torch.from_numpy(self.texts[slots].astype(np.int32))
        self._pinned = tokens.pin_memory() if pinned and device != "cpu" else None  # kept: the view does not own it
        if self._pinned is not None:
            flat = tensor_over(self._pinned.data_ptr(), self._pinned.nbytes, torch.device(device))
            tokens = flat.view(torch.int32).view(self._pinned.shape)
        self._total = torch.full((requests,), prompt, dtype=torch.int32, device=device)
        states = request_states(tokens.to(device), self._total, np.full(requests, prompt), 2 * TOKENS)
        self.copies = DeviceCopies(states, positions, ANSWERS, torch.device(device))
        names = [str(i) for i in range(requests)]
        for name in names:
            self.copies.begin(name, SimpleNamespace(extra_args=None, temperature=0.0))
        self.drafts = torch.zeros(requests, positions, dtype=torch.int64, device=device)
        self._drafted = torch.arange(DRAFT, DRAFT + positions, device=device).repeat(requests, 1)
        # A tensor per step, as in vLLM: Triton compiles another kernel for one that is not aligned to 16 bytes.
        self._totals = _rows(self.totals[:, slots], device)
        self._sampled = _rows(self.sampled, device)
        self._rejected = _rows(np.where(self.judged, positions + 1 - self.sampled, 0), device)
        scheduled = np.where(self.sampled > 0, 1, 0)
        prefill, on_device = np.full(requests, prompt), torch.from_numpy(slots).to(device)
        self._batches = [
            SimpleNamespace(
                num_reqs=requests, req_ids=names, idx_mapping=on_device, idx_mapping_np=slots,
                num_computed_tokens_np=self.totals[i] - self.sampled[i] - 1, num_scheduled_tokens=scheduled[i],
                prefill_len_np=prefill,
            )
            for i in range(steps)
        ]  # fmt: skip
        self.copies.rehearse()

    @property
    def version(self) -> int:
        """The draft's version, which changes every few steps."""
        return 1 + self.now // EACH_VERSION

    def advance(self) -> None:
        """Begin the next step, until the draft has proposed."""
        self.now += 1
        self._total.copy_(self._totals[self.now])
        self.drafts.copy_(self._drafted)

    def copy(self) -> None:
        """Do what copies add to a step."""
        now = self.now
        judged = self._sampled[now], self._rejected[now]
        self.copies.replace(self._batches[now], *judged, self.drafts, self.positions, self.version, ALL)
        self.counts = self.copies.fetch() or self.counts

    def settle(self) -> None:
        """Complete a fetch under way, and take its counts."""
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.counts = self.copies.fetch() or self.counts


def copies_agree(device: str, requests: int, prompt: int, positions: int, steps: int) -> dict[str, Any]:
    """Check that each proposal is the model's, that counts are right, and that no step synchronises.

    Args:
        steps: a multiple of FETCH_EVERY, so that the last fetch has all counts.
    """
    decoding = Decoding(device, requests, prompt, positions, steps)
    model, drafted = Model(decoding, ANSWERS), list(range(DRAFT, DRAFT + positions))
    wrong = compared = copied = 0
    for _ in range(steps):
        with _no_synchronisation(device):
            decoding.advance()
            decoding.copy()
        model.learn()
        for row, proposal in enumerate(decoding.drafts.tolist()):
            tokens, undecided = model.copy(row)
            expected = tokens if undecided else tokens + drafted[len(tokens) :]
            wrong += proposal[: len(expected)] != expected
            compared += len(expected)
            copied += len(tokens)
    decoding.settle()
    layout, counts = CountsLayout(positions), np.array(decoding.counts)
    seen = counts[: layout.compared].sum()
    verdicts = (
        counts[layout.verdicts : layout.versions].reshape(ORIGINS, positions + 1, positions + 1).sum(0)[positions]
    )
    accepted = np.bincount(decoding.sampled[decoding.judged] - 1, minlength=positions + 1)
    return {
        "proposals": steps * requests,
        "wrong_proposals": wrong,
        "compared_tokens": compared,
        "copied_tokens": copied,
        "wrong_counts": int(abs(seen - np.count_nonzero(decoding.sampled)) + np.abs(verdicts - accepted).sum()),
        "versions": sorted(counts[layout.versions :].tolist()),
    }


def copies_cost(
    device: str,
    batches: Sequence[int],
    positions: Sequence[int] = (3, 8),
    prompt: int = 2000,
    steps: int = 50,
    pinned: bool = False,
) -> dict[str, Any]:
    """Microseconds that DeviceCopies.replace and fetch add to a step, by requests in it and tokens of a proposal.

    "first" is the step that learns the prompts. With ``pinned`` the GPU reads texts from host memory, where vLLM has
    them by default. The view of that memory is made by the function for IPC memory, not by vLLM's
    ``get_accelerator_view_from_cpu_tensor``. For "cpu", ``pinned`` changes nothing.
    """
    found: dict[str, Any] = {}
    for batch in batches:
        found[str(batch)] = {}
        for most in positions:
            decoding = Decoding(device, batch, prompt, most, 1 + WARM + steps, pinned=pinned)
            taken = []
            for _ in range(1 + WARM + steps):
                decoding.advance()
                taken.append(elapsed_us(device, decoding.copy))
            host_us, device_us = zip(*taken[1 + WARM :], strict=True)
            found[str(batch)][str(most)] = {
                "host_us": percentile(host_us, 0.5),
                "device_us": percentile(device_us, 0.5),
                "host_p99_us": percentile(host_us, 0.99),
                "device_p99_us": percentile(device_us, 0.99),
                "first_host_us": taken[0][0],
                "first_device_us": taken[0][1],
            }
    return found


def copies_wait(device: str, batch: int = 32, positions: int = 8, prompt: int = 2000) -> dict[str, Any]:
    """Whether the host waits in a few steps: a request arrives in the first of them, and counts are fetched.

    As many steps are made before, with arriving requests and a fetch. They load kernels and allocate pinned memory, for
    which the host may wait.
    """
    from aurora_vllm.spec_decode.device_copies import FETCH_EVERY

    before = FETCH_EVERY + 2
    decoding = Decoding(device, batch, prompt, positions, 2 * before, [0] * (batch - 2) + [1, before])

    def steps() -> None:
        with _no_synchronisation(device):
            for _ in range(before):
                decoding.advance()
                decoding.copy()

    steps()
    decoding.settle()
    decoding.counts = None
    waits = host_waits(device, steps)
    decoding.settle()
    return {"host_waits": waits, "counts_arrive": decoding.counts is not None}


def _texts(requests: int, length: int) -> np.ndarray:
    """Repetitive texts, in which the next token depends on more than a few tokens. int64 [R, length or more]"""
    random = np.random.default_rng(0)
    words = random.integers(TOKENS, size=(WORDS, WORD_TOKENS))
    phrases = words[random.integers(WORDS, size=(PHRASES, PHRASE_WORDS))].reshape(PHRASES, -1)
    return phrases[random.integers(PHRASES, size=(requests, -(-length // phrases.shape[1])))].reshape(requests, -1)


def _rows(array: np.ndarray, device: str) -> list[torch.Tensor]:
    return [torch.from_numpy(row.astype(np.int32)).to(device) for row in array]


@contextlib.contextmanager
def _no_synchronisation(device: str) -> Iterator[None]:
    """Makes torch raise an error where the host would wait for the device."""
    if device == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
