"""Prompt lookup in the scheduler: replaces proposals by copies from the request itself or from earlier answers.

With vLLM's V1 runner every proposal passes through the scheduler before it is verified, and the scheduler knows each
request's tokens. A proposal is replaced by a copy where copies have been right more often, and cut where further tokens
are not worth verifying. Verification does not depend on where greedy proposals come from, so the output is the
target's.

Answers are kept as token ids, in this process's memory only. Those of a request that opts out of learning are not kept;
a request with a ``cache_salt``, vLLM's way not to share a cache with others, is neither copied nor copies others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aurora_vllm.control.copy_kinds import NO_COPY
from aurora_vllm.control.copying import Copies
from aurora_vllm.spec_decode.consent import may_learn
from aurora_vllm.spec_decode.prompt_lookup import KINDS, Copy, EarlierAnswers, PromptLookup


@dataclass
class _Simulation:
    """A copy that is compared with what is emitted, verified or not, and how many of its tokens were right so far."""

    copy: Copy
    right: int = 0


@dataclass
class _Request:
    vllm: Any  # vLLM's Request; its tokens are read once more when it has ended
    lookup: PromptLookup = field(default_factory=PromptLookup)
    copied: bool = False  # whether the proposal that is verified next is a copy
    rivals: tuple[int, int, int] | None = None  # kind of the copy, and first token of copy and of draft
    simulations: list[_Simulation] = field(default_factory=list)  # of every copy that could still be right

    def kind(self, copy: Copy | None) -> int:
        """The kind of a copy for this request."""
        return NO_COPY if copy is None else copy.kind(is_sampled=self.vllm.sampling_params.temperature > 0)


class DraftCopier:
    """Replaces proposals by copies, and learns from what is emitted when that is better.

    Args:
        positions: largest draft length.
        answers: tokens of earlier answers that are kept for other requests; 0 for none.
    """

    def __init__(self, positions: int, answers: int = 0) -> None:
        self.copies = Copies(positions, KINDS.usual)
        self._positions = positions
        self._answers = EarlierAnswers(answers) if answers else None
        self._requests: dict[str, _Request] = {}

    def replace(self, proposals: Any, requests: Mapping[str, Any], worth: Callable[[int, bool], int]) -> None:
        """Edit a vLLM ``DraftTokenIds`` in place.

        Args:
            proposals: ``req_ids`` and ``draft_token_ids``, a list of int lists.
            requests: vLLM's ``Request`` by id, with the step's tokens appended.
            worth: gives the number of tokens to verify, from the kind of the copy and whether it is taken.
        """
        for i, name in enumerate(proposals.req_ids):
            request = requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            known = self._requests.get(name) or self._requests.setdefault(name, _Request(request))
            known.copied = False  # in case something below fails
            self._learn(known, request.all_token_ids)
            proposals.draft_token_ids[i] = self._choose(known, proposals.draft_token_ids[i], worth)

    def copied(self, name: str) -> bool:
        """Whether the proposal under verification is a copy."""
        known = self._requests.get(name)
        return known is not None and known.copied

    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended; others may copy their answers from now on."""
        for name in names:
            known = self._requests.pop(name, None)
            if known is None or self._answers is None or known.vllm.cache_salt:
                continue
            if may_learn(known.vllm.sampling_params):
                self._answers.add(known.vllm.output_token_ids)

    def _learn(self, known: _Request, tokens: Any) -> None:
        """Take in the tokens that were emitted since the last proposal."""
        emitted = tokens[len(known.lookup) :]
        known.lookup.extend(emitted)
        if known.rivals is not None and emitted:
            kind, copied, drafted = known.rivals
            self.copies.compare(kind, copied == emitted[0], drafted == emitted[0])
            known.rivals = None
        known.simulations = [one for one in known.simulations if self._goes_on(known, one, emitted)]

    def _goes_on(self, known: _Request, simulation: _Simulation, emitted: Iterable[int]) -> bool:
        """Whether a simulated verification is not over when these tokens were emitted."""
        copied = simulation.copy.tokens
        for token in emitted:
            if simulation.right == len(copied) or copied[simulation.right] != token:  # the one after the accepted ones
                self.copies.simulate(known.kind(simulation.copy), len(copied), simulation.right)
                return False
            simulation.right += 1
        return True

    def _choose(self, known: _Request, draft: list[int], worth: Callable[[int, bool], int]) -> list[int]:
        copy = self._best_copy(known)
        kind = known.kind(copy)
        self.copies.seen(kind)
        if copy is not None and draft:
            known.rivals = kind, copy.tokens[0], draft[0]
        # Where the draft proposes nothing a copy has no rival, even if drafts have been right more often.
        known.copied = copy is not None and (not draft or self.copies.preferred(kind))
        proposed = copy.tokens if copy is not None and known.copied else draft
        return proposed[: worth(kind, known.copied)]

    def _best_copy(self, known: _Request) -> Copy | None:
        """The copy, from the request's own text or from earlier answers, with more tokens expected to be right."""
        found = [known.lookup.propose(self._positions)]
        if self._answers is not None and not known.vllm.cache_salt:
            found.append(self._answers.propose(known.lookup.end(), self._positions))
        copies = [copy for copy in found if copy is not None]
        # One of every step, not one after the other: those that are right last longer, and would be counted too seldom.
        known.simulations += [_Simulation(copy) for copy in copies]
        if len(copies) < 2:
            return copies[0] if copies else None
        return max(copies, key=lambda copy: self.copies.expected(known.kind(copy)))
