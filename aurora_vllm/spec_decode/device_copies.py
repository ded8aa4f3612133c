"""Copied proposals where they never pass through the scheduler: vLLM's V2 runner, overlapping steps.

The host learns of a step's tokens when the next one is under way, so what followed them earlier is looked up on the
device (:mod:`.copy_kernels`): two launches a step, no wait. The counts that the choice between copy and draft rests on
stay there, too, and are fetched every few steps without waiting for them.

Kept are token ids, hashed contexts and what followed them, in the device's memory only. A request that keeps itself out
of learning leaves nothing to others; one with a ``cache_salt`` neither leaves nor takes anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from aurora_vllm.control.copy_counts import COPIED, ORDERS, CountsLayout
from aurora_vllm.spec_decode import copy_kernels as kernels
from aurora_vllm.spec_decode.consent import is_private, may_learn
from aurora_vllm.spec_decode.copy_tables import MOST_TOKENS, OWN_ENTRIES, answers_entries
from aurora_vllm.spec_decode.runner_v2 import emitting
from aurora_vllm.spec_decode.upload import upload

WINDOW = 8192  # tokens at the end of a prompt that are looked at
FETCH_EVERY = 16  # steps between two looks at the counts


class DeviceCopies:
    """Looks up copies and puts them where they are preferred.

    Args:
        states: vLLM's ``RequestState``.
        positions: tokens of a proposal at most, vLLM's ``num_speculative_tokens``; 1..8.
        answers: tokens of earlier answers that are remembered for other requests; 0 for none.
        device: the target's.
    """

    def __init__(self, states: Any, positions: int, answers: int, device: torch.device) -> None:
        if not 1 <= positions <= MOST_TOKENS:
            raise ValueError(f"proposals of {positions} tokens; 1 to {MOST_TOKENS} can be copied")
        self._states, self._positions, self._device = states, positions, device
        self._layout = CountsLayout(positions)
        slots, entries = int(states.max_num_reqs), answers_entries(answers)
        self._own = torch.zeros(OWN_ENTRIES, dtype=torch.int64, device=device)
        self._others = torch.zeros(entries, dtype=torch.int64, device=device)
        self._requests = torch.zeros(slots, kernels.COLUMNS.value, dtype=torch.int64, device=device)
        self._counts = torch.zeros(self._layout.versions, dtype=torch.int64, device=device)
        self._fetched = torch.zeros(self._layout.size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._fetching: Any = None  # CUDA event behind a fetch under way
        self._steps = 0
        self._salt = 0
        self._versions, self._newest = [0, 0], 0
        self._takes = answers > 0
        self._untold: dict[str, int] = {}  # ABILITIES of requests that the device does not know
        self._lookup = {
            "ORDERS": (0, *ORDERS),
            "NUM_ORDERS": len(ORDERS),
            "OWN_MASK": OWN_ENTRIES - 1,
            "OTHERS_MASK": entries - 1,
            "num_warps": 1,
        }

    def begin(self, name: str, params: Any) -> None:
        """A request comes, or comes back. params: vLLM's SamplingParams."""
        shares = self._takes and not is_private(params)
        abilities = kernels.TAKES.value * shares + kernels.LEAVES.value * (shares and may_learn(params))
        self._untold[name] = abilities + kernels.IS_SAMPLED.value * (params.temperature > 0)

    def end(self, name: str) -> None:
        """A request has ended. What it left stays for others."""
        self._untold.pop(name, None)

    def rehearse(self) -> None:
        """Have all kernels compiled and loaded, which takes a second, before anybody waits for it."""
        told = upload(array("q", [0] * (1 + kernels.COLUMNS.value)), self._device)
        self._requests[told[:1]] = told[1:].view(1, -1)
        none = np.zeros(1, dtype=np.int64)
        batch = SimpleNamespace(
            num_reqs=1, idx_mapping=torch.zeros(1, dtype=torch.int64, device=self._device),
            num_computed_tokens_np=none, num_scheduled_tokens=none, prefill_len_np=none + 1,
        )  # fmt: skip
        nothing = torch.zeros(1, dtype=torch.int32, device=self._device)
        drafts = torch.zeros(1, self._positions, dtype=torch.int64, device=self._device)
        self.replace(batch, nothing, nothing, drafts, 0, None, 0)

    @torch.inference_mode()
    def replace(
        self,
        batch: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        drafts: torch.Tensor,
        length: int,
        drafted_by: int | None,
        preferred: int,
    ) -> None:
        """Behind a step's sampling and drafting, on the current stream: edit its proposals in place.

        Args:
            batch: vLLM's ``InputBatch`` of R requests.
            num_sampled, num_rejected: int32 [R], as ``propose`` is given them.
            drafts: int64 [R, positions], what the draft proposed; what stands there counts only where it ran.
            length: tokens that will be verified of each proposal; 0 for none.
            drafted_by: version of the draft that proposed them; None: it did not run.
            preferred: bit of each kind of copy that is to be proposed in the draft's stead.
        """
        states = self._states
        newest = self._take_in(batch)
        rows = batch.num_reqs
        text = (states.all_token_ids.gpu, states.all_token_ids.gpu.stride(0), batch.idx_mapping, states.total_len.gpu)
        tables = (self._requests, self._own, self._others)
        blocks = -(-newest // kernels.BLOCK.value)
        vocabulary = int(states.vocab_size)
        kernels.learn_kernel[(rows, blocks)](*text, num_sampled, *tables, VOCABULARY=vocabulary, **self._lookup)
        kernels.propose_kernel[(rows,)](
            *text,
            num_sampled,
            num_rejected,
            drafts,
            drafts.stride(0),
            *tables,
            self._counts,
            length,
            0 if drafted_by is None else 1 + self._origin(drafted_by),
            preferred,
            POSITIONS=self._positions,
            COMPARED=self._layout.compared,
            RIGHT=self._layout.simulated,
            VERDICTS=self._layout.verdicts,
            COPIED=COPIED,
            **self._lookup,
        )

    def _take_in(self, batch: Any) -> int:
        """Tell the device of requests that it does not know. Returns how many tokens a request may have gained."""
        states, newest = self._states, 1 + self._positions
        if not self._untold:
            return newest
        slots, rows = array("q"), array("q")
        for i in np.flatnonzero(emitting(batch)):
            abilities = self._untold.pop(batch.req_ids[i], None)
            if abilities is None:
                continue
            self._salt += 1
            slot = int(batch.idx_mapping_np[i])
            prefill = int(batch.prefill_len_np[i])
            learned = max(0, prefill - WINDOW)
            newest = max(newest, prefill - learned + 1 + self._positions)
            slots.append(slot)
            begins = self._salt, learned, abilities, int(states.prompt_len.np[slot])
            rows.extend(begins + (0,) * (kernels.COLUMNS.value - len(begins)))
        if slots:
            told = upload(slots + rows, self._device)
            self._requests[told[: len(slots)]] = told[len(slots) :].view(len(slots), -1)
        return newest

    def _origin(self, version: int) -> int:
        """0 or 1: the newest two versions take turns, since verdicts on the older are to come when the newer drafts."""
        if self._versions[self._newest] != version:
            self._newest = 1 - self._newest
            self._versions[self._newest] = version
        return self._newest

    def fetch(self) -> Sequence[int] | None:
        """The counts as they stood a few steps ago, where a fetch is done; never waits. Call once a step."""
        self._steps += 1
        if self._fetching is None:
            if self._steps % FETCH_EVERY:
                return None
            self._fetched[: self._layout.versions].copy_(self._counts, non_blocking=True)
            self._fetched[self._layout.versions :] = torch.tensor(self._versions)
            if self._device.type == "cuda":
                self._fetching = torch.cuda.Event()
                self._fetching.record()
                return None
        elif not self._fetching.query():
            return None
        self._fetching = None
        return self._fetched.tolist()
