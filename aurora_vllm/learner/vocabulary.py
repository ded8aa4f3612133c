"""Draft vocabulary: which of the target's tokens the draft may propose.

A draft head over the whole vocabulary costs more than the rest of an EAGLE-3 draft (49,152 x 576 against 4 million
weights for SmolLM2-135M), so the draft proposes from a subset and ``d2t``/``t2d`` translate. A token outside the
subset is never proposed: it ends the accepted prefix, nothing else.

Day 0 has seen no traffic. What it has is the tokenizer: byte-pair merges are learned most frequent first, so the order
of the merges *is* a frequency table of the corpus the target's tokenizer was made from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def day0_vocabulary(target: Path, vocab_size: int, size: int) -> torch.Tensor:
    """The tokens a draft may propose before any traffic was seen.

    In order of preference until ``size`` is reached: the tokens that end an answer, other added tokens (chat marks,
    ``<think>``; at most a sixteenth of the room), bytes and ASCII characters, then merges in the order they were
    learned (Unigram
    tokenizers: by score), then whatever ids are left, lowest first. A target without ``tokenizer.json`` gets the
    lowest ids, which in byte-pair vocabularies are in merge order as well.

    Args:
        target: directory of the target checkpoint.
        vocab_size: V, rows of the target's lm_head (may exceed the tokenizer's own count).
        size: wanted number of tokens, at most V.

    Returns:
        int64 [size], ascending target ids, no duplicates.
    """
    if not 0 < size <= vocab_size:
        raise ValueError(f"draft vocabulary of {size} does not fit a target vocabulary of {vocab_size}")
    tokenizer = _read_json(target / "tokenizer.json")
    chosen: dict[int, None] = dict.fromkeys(_ending_tokens(target))
    added = [token["id"] for token in tokenizer.get("added_tokens", [])]
    chosen.update(dict.fromkeys(added[: max(1, size // 16)]))
    chosen.update(dict.fromkeys(_by_frequency(tokenizer.get("model", {}))))
    chosen.update(dict.fromkeys(range(vocab_size)))
    valid = [token for token in chosen if 0 <= token < vocab_size]
    return torch.tensor(sorted(valid[:size]), dtype=torch.int64)


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
    """Counts emitted tokens, so that the share the draft could have proposed is known (and a better subset can be
    chosen).

    Counts only, in memory only: no order, no text, no request.
    """

    def __init__(self, draft_ids: torch.Tensor, vocab_size: int) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64)
        self._draft_ids = draft_ids

    def observe(self, emitted: torch.Tensor) -> None:
        """Count tokens the target emitted. emitted: int64 [N]."""
        self.counts += torch.bincount(emitted, minlength=len(self.counts))

    def share(self) -> float:
        """Share of all emitted tokens that lie in the draft vocabulary; 0 before the first token."""
        total = int(self.counts.sum())
        return int(self.counts[self._draft_ids].sum()) / total if total else 0.0


def _by_frequency(model: dict[str, Any]) -> list[int]:
    """Token ids of a ``tokenizer.json`` model, most frequent first as far as the file tells."""
    vocab = model.get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [[piece, log probability], ...] by id
        return sorted(range(len(vocab)), key=lambda token: -vocab[token][1])
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
    merged = dict.fromkeys("".join(pair) for pair in merges)
    # What no merge makes is the alphabet. Bytes and ASCII come first; thousands of rare characters (SentencePiece
    # vocabularies list them) go last. Byte-level alphabets write a byte as one character below U+0144.
    alphabet = [piece for piece in vocab if piece not in merged]
    common = [p for p in alphabet if p.startswith("<0x") or p == "\u2581" or (len(p) == 1 and ord(p) < 0x144)]
    ordered = dict.fromkeys([*common, *merged, *alphabet])
    return [vocab[piece] for piece in ordered if piece in vocab]


def _ending_tokens(target: Path) -> list[int]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(target / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if value is not None else []
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
