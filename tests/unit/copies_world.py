"""vLLM's V2 runner as far as copies see it, and what they should propose, by dictionaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from aurora_vllm.control.copy_counts import KINDS, NUM_KINDS, ORDERS, CountsLayout
from aurora_vllm.control.copy_kinds import NO_COPY
from aurora_vllm.spec_decode.consent import LEARN_KEY, note_salt
from aurora_vllm.spec_decode.device_copies import DeviceCopies
from aurora_vllm.spec_decode.request_states import request_states

SLOTS, LONGEST_TEXT, VOCABULARY, ALL = 4, 400, 1000, (1 << NUM_KINDS) - 1
DRAFT = 90  # the first of the tokens that the draft proposes; no text has them


@dataclass
class Request:
    name: str
    slot: int
    prompt: list[int]
    params: Any
    text: list[int] = field(default_factory=list)
    computed: int = 0


class Straw:
    """vLLM's V2 runner as far as copies see it: slots, texts, and a batch for each step."""

    def __init__(self, positions: int = 3, answers: int = 1024) -> None:
        self.positions = positions
        self.tokens = torch.zeros(SLOTS, LONGEST_TEXT, dtype=torch.int32)
        self.total = torch.zeros(SLOTS, dtype=torch.int32)
        self.prompts = np.zeros(SLOTS, dtype=np.int32)
        states = request_states(self.tokens, self.total, self.prompts, VOCABULARY)
        self.copies = DeviceCopies(states, positions, answers, torch.device("cpu"))
        self.layout = CountsLayout(positions)
        self.running: dict[str, Request] = {}
        self.length = 0  # tokens of each proposal that the next step verifies

    def arrive(
        self, name: str, prompt: list[int], salt: str | None = None, learn: bool = True, temperature: float = 0.0
    ) -> None:
        params = SimpleNamespace(extra_args=None if learn else {LEARN_KEY: False}, temperature=temperature)
        note_salt(SimpleNamespace(sampling_params=params, cache_salt=salt))
        used = {request.slot for request in self.running.values()}
        slot = next(slot for slot in range(SLOTS) if slot not in used)
        self.running[name] = Request(name, slot, prompt, params)
        self._come(self.running[name])

    def _come(self, request: Request) -> None:
        self.copies.begin(request.name, request.params)
        request.text = request.text or list(request.prompt)
        request.computed = 0
        self.tokens[request.slot].fill_(-7)  # whatever stood there before
        self.tokens[request.slot, : len(request.text)] = torch.tensor(request.text)
        self.total[request.slot], self.prompts[request.slot] = len(request.text), len(request.prompt)

    def preempt(self, name: str) -> None:
        """It comes back at once, with what it has said as part of what is to be computed."""
        self._come(self.running[name])

    def leave(self, name: str) -> None:
        del self.running[name]
        self.copies.end(name)

    def step(
        self, emitted: dict[str, list[int]], length: int = 3, drafted_by: int | None = 1, preferred: int = ALL
    ) -> dict[str, list[int]]:
        """One step; a request that emits nothing is inside its prompt. Returns what is proposed next, by name."""
        requests = [self.running[name] for name in emitted]
        scheduled, prefill, sampled, rejected = [], [], [], []
        for request in requests:
            tokens = emitted[request.name]
            new = not request.computed and bool(tokens)
            length_before = len(request.text)
            scheduled.append(length_before - request.computed if tokens else 0)
            prefill.append(length_before if new or not tokens else 1)
            sampled.append(len(tokens))
            rejected.append(self.length + 1 - len(tokens) if tokens and not new else 0)
            self.tokens[request.slot, length_before : length_before + len(tokens)] = torch.tensor(tokens)
            request.text += tokens
            self.total[request.slot] = len(request.text)
        batch = SimpleNamespace(
            num_reqs=len(requests), req_ids=[request.name for request in requests],
            idx_mapping=torch.tensor([request.slot for request in requests]),
            idx_mapping_np=np.array([request.slot for request in requests]),
            num_computed_tokens_np=np.array([request.computed for request in requests]),
            num_scheduled_tokens=np.array(scheduled), prefill_len_np=np.array(prefill),
        )  # fmt: skip
        for request in requests:
            request.computed = len(request.text) - 1 if emitted[request.name] else 0
        drafts = torch.arange(DRAFT, DRAFT + self.positions).repeat(len(requests), 1)
        counts = torch.tensor(sampled, dtype=torch.int32), torch.tensor(rejected, dtype=torch.int32)
        self.copies.replace(batch, *counts, drafts, length, drafted_by, preferred)
        self.length = length
        return dict(zip(batch.req_ids, drafts.tolist(), strict=True))

    def counts(self) -> dict[str, Any]:
        """What is counted, by table."""
        all_, layout, width = self.copies._counts, self.layout, self.positions + 1
        return {
            "seen": all_[: layout.compared],
            "compared": all_[layout.compared : layout.simulated].view(NUM_KINDS, 2, 2),
            "simulated": all_[layout.simulated : layout.verdicts].view(NUM_KINDS, width),
            "verdicts": all_[layout.verdicts : layout.versions].view(3, width, width),
        }


class Naive:
    """The same by dictionaries from contexts to the token after them."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.own: dict[tuple[object, ...], int] = {}
        self.others: dict[tuple[int, ...], int] = {}
        self.known: dict[str, int] = {}

    def learn(self, request: Request) -> None:
        text, key = request.text, request.name
        for at in range(self.known.get(key, 0), len(text)):
            for order in ORDERS:
                if at >= order:
                    self.own[key, *text[at - order : at]] = text[at]
                if at >= order + len(request.prompt) and leaves(request):
                    self.others[tuple(text[at - order : at])] = text[at]
        self.known[key] = len(text)

    def propose(self, request: Request) -> tuple[list[int], int]:
        """The copy, and its kind."""
        text, copy, first, kinds = list(request.text), list[int](), NO_COPY, KINDS
        is_sampled = request.params.temperature > 0
        for _ in range(self.positions):
            found, kind = None, NO_COPY
            for order in ORDERS:
                context = tuple(text[-order:]) if len(text) >= order else None
                if context in self.others and takes(request):
                    found, kind = self.others[context], kinds.number(order, True, is_sampled)
                if context is not None and (request.name, *context) in self.own:
                    found, kind = self.own[request.name, *context], kinds.number(order, False, is_sampled)
            if found is None:
                break
            first = first or kind
            copy.append(found)
            text.append(found)
        return copy, first


def leaves(request: Request) -> bool:
    return takes(request) and (request.params.extra_args or {}).get(LEARN_KEY, True)


def takes(request: Request) -> bool:
    return "aurora_private" not in (request.params.extra_args or {})


def expected(copy: list[int], length: int = 3) -> list[int]:
    """Of a preferred copy beside the draft; without a copy the draft's."""
    drafts = list(range(DRAFT, DRAFT + 3))
    return [*copy[:length], *drafts[len(copy[:length]) :]] if copy else drafts
