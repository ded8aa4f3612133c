"""What transformers says about the same tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aurora_vllm.transport.rows import Field, RowFlag, RowLayout

TOLERANCE = 1e-3
# SmolLM2 has massive activations: two or three channels of its residual stream reach 2e4 at attention sinks, and
# transformers in float32 differs from itself in float64 by 0.2 there (everywhere else by less than 1e-3). Such a
# channel is held to 1e-5 of its own largest value in the sequence; all others, and the last hidden state, to 1e-3.
OF_MASSIVE = 1e-5
# A rejected branch is text nobody would write ("to to to"); there float32 is off its float64 self by several 1e-3.
BRANCH_TOLERANCE = 1e-2
BRANCHES_COMPARED = 6  # of each request; every one costs a forward pass of transformers over its tokens


@dataclass
class RequestRows:
    """Rows of one request, sorted into the path and the branches that were rejected."""

    path: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )  # position -> token, aux, last
    branches: list[list[tuple[int, int, torch.Tensor, torch.Tensor]]] = field(default_factory=list)
    emitted: dict[int, int] = field(default_factory=dict)  # position -> token the target chose after it
    temperature_milli: int = 0
    ended: bool = False

    @property
    def tokens(self) -> list[int]:
        """Tokens of the path, from its first position on."""
        return [self.path[p][0] for p in sorted(self.path)]


def sort_rows(rows: torch.Tensor, layout: RowLayout) -> dict[int, RequestRows]:
    """Sort raw rows by request. Independent of the learner's assembler on purpose."""
    meta, aux, last = layout.meta(rows), layout.aux(rows), layout.last(rows)
    found: dict[int, RequestRows] = {}
    open_branch: dict[int, int] = {}
    for i in range(len(rows)):
        words = meta[i].tolist()
        key = words[Field.REQUEST_LOW] | words[Field.REQUEST_HIGH] << 31
        request = found.setdefault(key, RequestRows())
        if words[Field.FLAGS] & RowFlag.END:
            request.ended = True
            continue
        position, token = words[Field.POSITION], words[Field.TOKEN]
        request.temperature_milli = words[Field.TEMPERATURE_MILLI]
        if words[Field.FLAGS] & RowFlag.REJECTED:
            if open_branch.get(key) != words[Field.STEP]:
                request.branches.append([])
                open_branch[key] = words[Field.STEP]
            request.branches[-1].append((position, token, aux[i], last[i]))
            continue
        request.path[position] = (token, aux[i], last[i])
        if words[Field.EMITTED] >= 0:
            request.emitted[position] = words[Field.EMITTED]
    return found


def count_verdicts(rows: torch.Tensor, layout: RowLayout) -> dict[str, Any]:
    """The counters vLLM keeps, counted from rows."""
    meta = layout.meta(rows)
    tokens = 0
    per_position = [0, 0, 0]
    steps = set()
    for words in meta.tolist():
        if words[Field.FLAGS] & RowFlag.END or words[Field.DRAFT_INDEX] < 0:
            continue
        steps.add((words[Field.REQUEST_LOW], words[Field.REQUEST_HIGH], words[Field.STEP]))
        tokens += 1
        per_position[words[Field.DRAFT_INDEX]] += not words[Field.FLAGS] & RowFlag.REJECTED
    return {
        "drafts": len(steps),
        "draft_tokens": tokens,
        "accepted_tokens": sum(per_position),
        "accepted_tokens_per_pos": per_position,
    }


class Reference:
    """transformers' forward of the same checkpoint."""

    def __init__(self, target: Path, aux_layers: tuple[int, ...]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self._aux_layers = aux_layers

    def states(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Aux states [T, n*H] and last hidden states [T, H] of a sequence."""
        return self._forward(tokens)[:2]

    def branching(
        self, tokens: list[int], branches: list[tuple[int, list[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """As ``states``; and the same of each branch, which goes on from the cache instead of computing the path again.

        Args:
            branches: the position at which each leaves the sequence, and its tokens from there on.
        """
        aux, last, cache = self._forward(tokens)
        found = []
        for start, branch in branches:
            until_there = copy.deepcopy(cache)
            until_there.crop(start)
            found.append(self._forward(branch, until_there)[:2])
        return aux, last, found

    @torch.inference_mode()
    def last_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states of several sequences of the same length. [n, T] -> [n, T, H]"""
        out: torch.Tensor = self._model.model(tokens, use_cache=False).last_hidden_state
        return out

    @torch.inference_mode()
    def _forward(self, tokens: list[int], cache: Any = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Of tokens behind what is in the cache. The states of theirs, and the cache with them."""
        out = self._model.model(
            torch.tensor([tokens]), past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        aux = torch.cat([out.hidden_states[layer][0] for layer in self._aux_layers], dim=-1)
        return aux, out.last_hidden_state[0], out.past_key_values


def assert_states_agree(reference: Reference, requests: list[RequestRows], full_prefixes: dict[int, list[int]]) -> int:
    """Compare every row with transformers. full_prefixes: tokens before the first captured position, by request."""
    compared = 0
    for index, request in enumerate(requests):
        first = min(request.path)
        tokens = full_prefixes.get(index, [])[:first] + request.tokens
        assert sorted(request.path) == list(range(first, len(tokens)))
        branches = request.branches[:BRANCHES_COMPARED]
        aux, last, of_branches = reference.branching(
            tokens, [(branch[0][0], [token for _, token, _, _ in branch]) for branch in branches]
        )
        allowed = (aux.abs().amax(0) * OF_MASSIVE).clamp(min=TOLERANCE)  # [3H]
        for position, (_, got_aux, got_last) in request.path.items():
            assert ((got_aux - aux[position]).abs() <= allowed).all()
            assert (got_last - last[position]).abs().max() <= TOLERANCE
            compared += 1
        for branch, (aux, last) in zip(branches, of_branches, strict=True):
            for position, _, got_aux, got_last in branch:
                at = position - branch[0][0]
                assert ((got_aux - aux[at]).abs() <= allowed.clamp(min=BRANCH_TOLERANCE)).all()
                assert (got_last - last[at]).abs().max() <= BRANCH_TOLERANCE
                compared += 1
    return compared
