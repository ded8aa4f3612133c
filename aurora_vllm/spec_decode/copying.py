"""Proposals between worker and scheduler: the draft's, or what the request itself said before.

The scheduler of vLLM's V1 engine is handed every proposal before it is verified, and knows each request's tokens. Here
a proposal is replaced by a copy where copies have been right more often, and cut where further tokens would not pay
for being verified. Verification does not ask where greedy proposals come from, so what is emitted stays the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aurora_vllm.control.copying import Copies
from aurora_vllm.spec_decode.prompt_lookup import LONGEST_MATCH, Copy, PromptLookup

NO_MATCH = Copy([], 0)


@dataclass
class _Request:
    lookup: PromptLookup = field(default_factory=PromptLookup)
    copied: bool = False  # the proposal that is verified next
    rivals: tuple[int, int, int] | None = None  # match length, and both first tokens
    simulated: Copy | None = None  # a copy nobody need verify, and how many of its tokens came true
    right: int = 0


class DraftCopier:
    """Replaces proposals, and learns from what is emitted when to.

    Args:
        positions: largest draft length.
    """

    def __init__(self, positions: int) -> None:
        self.copies = Copies(positions, LONGEST_MATCH)
        self._positions = positions
        self._requests: dict[str, _Request] = {}

    def replace(self, proposals: Any, requests: Mapping[str, Any], worth: Callable[[int, bool], int]) -> None:
        """Edit a vLLM ``DraftTokenIds`` in place.

        Args:
            proposals: ``req_ids`` and ``draft_token_ids``, a list of int lists.
            requests: vLLM's ``Request`` by id, with the step's tokens appended.
            worth: how many tokens to verify of a proposal, from its match length and whether it is a copy.
        """
        for i, name in enumerate(proposals.req_ids):
            request = requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            known = self._requests.setdefault(name, _Request())
            known.copied = False  # until this proposal is replaced, whatever fails below
            self._learn(known, request.all_token_ids)
            proposals.draft_token_ids[i] = self._choose(known, proposals.draft_token_ids[i], worth)

    def copied(self, name: str) -> bool:
        """Whether the proposal under verification is a copy."""
        known = self._requests.get(name)
        return known is not None and known.copied

    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended."""
        for name in names:
            self._requests.pop(name, None)

    def _learn(self, known: _Request, tokens: Any) -> None:
        """What was emitted since the last proposal."""
        emitted = tokens[len(known.lookup) :]
        known.lookup.extend(emitted)
        if known.rivals is not None and emitted:
            match_length, copy, draft = known.rivals
            self.copies.compare(match_length, copy == emitted[0], draft == emitted[0])
            known.rivals = None
        for token in emitted:
            if known.simulated is None:
                break
            if known.right < self._positions and known.simulated.tokens[known.right] == token:
                known.right += 1
            else:  # the token after the accepted ones: the simulated step is over
                self.copies.simulate(known.simulated.match_length, self._positions, known.right)
                known.simulated = None

    def _choose(self, known: _Request, draft: list[int], worth: Callable[[int, bool], int]) -> list[int]:
        copy = known.lookup.propose(self._positions) or NO_MATCH
        self.copies.seen(copy.match_length)
        if known.simulated is None and copy.tokens:
            known.simulated, known.right = copy, 0
        if copy.tokens and draft:
            known.rivals = copy.match_length, copy.tokens[0], draft[0]
        known.copied = self.copies.preferred(copy.match_length)
        return (copy.tokens if known.copied else draft)[: worth(copy.match_length, known.copied)]
