"""The draft vocabulary: which of the target's tokens the draft may propose.

A draft head over the whole vocabulary costs more than the rest of an EAGLE-3 draft (49,152 x 576 against 4 million
weights for SmolLM2-135M), so the draft proposes from a subset and ``d2t``/``t2d`` translate. A token outside the
subset is never proposed, which only ends the accepted prefix there.

On day 0 there is no traffic, but a tokenizer. Byte-pair merges are learned most frequent first, so their order *is* a
frequency table of the tokenizer's corpus. Traffic is another corpus: once enough of it was counted, the vocabulary
follows it (:class:`Reselection`; remap.py moves the draft).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def day0_vocabulary(target: Path, vocab_size: int, size: int) -> torch.Tensor:
    """The tokens a draft may propose before there is any traffic: the first ``size`` of :func:`day0_order`.

    Args:
        target: directory of the target checkpoint.
        vocab_size: V, rows of the target's lm_head (may exceed the tokenizer's own count).
        size: wanted number of tokens, at most V.

    Returns:
        int64 [size], ascending target ids, no duplicates.
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}")
    return day0_order(target, vocab_size, size)[:size].sort().values


def day0_order(target: Path, vocab_size: int, size: int) -> torch.Tensor:
    """All of the target's tokens, those first that a draft of ``size`` tokens needs most.

    The order: tokens that end an answer; other added tokens (chat marks, ``<think>``; at most a sixteenth of ``size``);
    bytes and ASCII characters; merges in the order they were learned (Unigram tokenizers: by score); all other ids,
    lowest first. A target without ``tokenizer.json`` gets the lowest ids, which in byte-pair vocabularies are in merge
    order as well.

    Returns:
        int64 [V], each target id once.
    """
    tokenizer = _read_json(target / "tokenizer.json")
    chosen: dict[int, None] = dict.fromkeys(ending_tokens(target))
    added = [token["id"] for token in tokenizer.get("added_tokens", [])]
    chosen.update(dict.fromkeys(added[: max(1, size // 16)]))
    chosen.update(dict.fromkeys(_by_frequency(tokenizer.get("model", {}))))
    chosen.update(dict.fromkeys(range(vocab_size)))
    return torch.tensor([token for token in chosen if 0 <= token < vocab_size], dtype=torch.int64)


def ending_tokens(target: Path) -> list[int]:
    """Ids of the tokens that end an answer, as the target's configuration names them."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(target / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if value is not None else []
    return ids


def vocabulary_maps(draft_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two maps an EAGLE-3 checkpoint holds.

    Args:
        draft_ids: int64 [D], ascending target ids.
        vocab_size: V.

    Returns:
        d2t int64 [D]: *offset* from draft id to target id (vLLM adds it to ``arange(D)``), t2d bool [V]: membership.
    """
    d2t = draft_ids - torch.arange(len(draft_ids))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[draft_ids] = True
    return d2t, t2d


class Coverage:
    """Fading counts of the tokens that the target emits: they give the share that a draft vocabulary covers, and a
    better vocabulary.

    Only counts, and only in memory: no order, no text, no request.

    Args:
        vocab_size: V.
        memory: tokens after which a token counts for 1/e.
    """

    def __init__(self, vocab_size: int, memory: float = 20_000.0) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.float64)
        self.memory = memory
        self.observed = 0  # tokens so far

    def observe(self, emitted: torch.Tensor) -> None:
        """Count tokens the target emitted. emitted: int64 [N]."""
        self.observed += len(emitted)
        self.counts *= math.exp(-len(emitted) / self.memory)
        self.counts += torch.bincount(emitted, minlength=len(self.counts))

    def share(self, target_ids: torch.Tensor) -> float:
        """Share of recent tokens that are in a draft vocabulary, int64 [D]; 0 before the first token."""
        total = float(self.counts.sum())
        return float(self.counts[target_ids.cpu()].sum()) / total if total else 0.0


@dataclass
class Reselection:
    """When the draft vocabulary is chosen anew, and what is chosen.

    Args:
        target: directory of the target checkpoint; read when the first choice is made.
        threshold: share of recent tokens below which a better vocabulary is looked for. 0: never.
        enough: tokens before the first choice, and between two, so that a draft with a new vocabulary can be judged.
        min_gain: share that a choice has to gain. For a token that is new to the vocabulary, one occurrence is not
            counted (leave-one-out: without it the token would not have been chosen). Otherwise every rare word would be
            a reason to choose again.
    """

    target: Path
    threshold: float
    enough: int = 2_000
    min_gain: float = 0.01
    _rank: torch.Tensor | None = None  # int64 [V], rank in the day-0 order
    _chosen_at: int = 0  # tokens seen when the last choice was made

    def propose(self, coverage: Coverage, current: torch.Tensor) -> torch.Tensor | None:
        """A better vocabulary of the same size, int64 [D] ascending, or None where ``current`` is good enough."""
        if coverage.observed - self._chosen_at < self.enough or coverage.share(current) >= self.threshold:
            return None
        counts, current = coverage.counts, current.cpu()  # the counts are on the host, whatever the draft's device
        ending = torch.tensor(ending_tokens(self.target), dtype=torch.int64)
        chosen = select(counts, current, self._day0_rank(len(counts), len(current)), ending)
        entering, leaving = chosen[~torch.isin(chosen, current)], current[~torch.isin(current, chosen)]
        gain = (counts[entering] - 1).clamp(min=0).sum() - counts[leaving].sum()
        if float(gain / counts.sum()) < self.min_gain:
            return None
        self._chosen_at = coverage.observed
        return chosen

    def _day0_rank(self, vocab_size: int, size: int) -> torch.Tensor:
        if self._rank is None:
            self._rank = day0_order(self.target, vocab_size, size).argsort()
        return self._rank


def select(counts: torch.Tensor, current: torch.Tensor, rank: torch.Tensor, ending: torch.Tensor) -> torch.Tensor:
    """A draft vocabulary for this traffic, as large as the current one.

    First the tokens that end an answer, then those that were seen, most frequent first, then the others of the current
    vocabulary in the order of ``rank``, which also breaks ties.

    Args:
        counts: float64 [V], of emitted tokens.
        current: int64 [D], target ids.
        rank: int64 [V], lowest first.
        ending: int64 [E], target ids; those outside the vocabulary are ignored.

    Returns:
        int64 [D], ascending target ids, no duplicates.
    """
    protected = torch.zeros(len(counts), dtype=torch.bool)
    protected[ending[(ending >= 0) & (ending < len(counts))]] = True
    eligible = protected | (counts > 0)
    eligible[current] = True
    ids = eligible.nonzero().squeeze(1)
    for key in (-rank, counts, protected.long()):  # stable sorts, the most important key last
        ids = ids[key[ids].argsort(descending=True, stable=True)]
    return ids[: len(current)].sort().values


def _by_frequency(model: dict[str, Any]) -> list[int]:
    """Token ids of a ``tokenizer.json`` model, most frequent first as far as the file shows it."""
    vocab = model.get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [[piece, log probability], ...] by id
        return sorted(range(len(vocab)), key=lambda token: -vocab[token][1])
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    merged = dict.fromkeys("".join(pair) for pair in merges)
    # Pieces that are no merge's result form the alphabet. Bytes and ASCII come first; thousands of rare characters (in
    # SentencePiece vocabularies) go last. Byte-level alphabets write a byte as one character below U+0144.
    alphabet = [piece for piece in vocab if piece not in merged]
    common = [p for p in alphabet if p.startswith("<0x") or p == "\u2581" or (len(p) == 1 and ord(p) < 0x144)]
    ordered = dict.fromkeys([*common, *merged, *alphabet])
    return [vocab[piece] for piece in ordered if piece in vocab]


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
