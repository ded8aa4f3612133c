"""A model of the tables of copies, with dictionaries: what they may hold, and what must be proposed from them."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from aurora_vllm.control.copy_counts import ORDERS
from aurora_vllm.spec_decode.copy_tables import OWN_ENTRIES, answers_entries

if TYPE_CHECKING:
    from benchmarks.gpu_copies import Decoding

NOTHING = -1  # in place of a token


class Model:
    """The tables as dictionaries of what each entry may hold: of several words that one launch writes, any may remain.

    Args:
        decoding: the requests whose steps :meth:`learn` and :meth:`copy` follow.
        answers: tokens of answers that are kept for other requests.
    """

    def __init__(self, decoding: Decoding, answers: int) -> None:
        self._decoding = decoding
        self._own: dict[int, set[int]] = {}
        self._others: dict[int, set[int]] = {}
        self._masks = OWN_ENTRIES - 1, answers_entries(answers) - 1
        self._known = [0] * len(decoding.texts)

    def learn(self) -> None:
        """Enter the current step's tokens."""
        decoding, (own_mask, others_mask) = self._decoding, self._masks
        own: defaultdict[int, set[int]] = defaultdict(set)
        others: defaultdict[int, set[int]] = defaultdict(set)
        for row in np.flatnonzero(decoding.sampled[decoding.now]).tolist():
            text, salt = decoding.texts[row], decoding.salts[row]
            at = np.arange(self._known[row], decoding.totals[decoding.now, row])
            contexts = _contexts(text, at)
            for i, order in enumerate(ORDERS):
                _note(own, *_entry(contexts[:, i], salt, own_mask), text[at], at >= order)
                _note(others, *_entry(contexts[:, i], 0, others_mask), text[at], at >= decoding.prompt + order)
            self._known[row] += len(at)
        self._own.update(own)
        self._others.update(others)

    def copy(self, row: int) -> tuple[list[int], bool]:
        """The tokens that must be proposed first, and whether the next depends on which of several words remained."""
        decoding, (own_mask, others_mask) = self._decoding, self._masks
        if not decoding.sampled[decoding.now, row]:
            return [], False
        total, salt = decoding.totals[decoding.now, row], decoding.salts[row]
        text = decoding.texts[row, total - max(ORDERS) : total].tolist()
        copied: list[int] = []
        while len(copied) < decoding.positions:
            contexts = _contexts(np.array(text), np.array([len(text)]))
            may = {NOTHING}
            for i in range(len(ORDERS)):
                may = _look_up(self._others, *_entry(contexts[:, i], 0, others_mask), may)
                may = _look_up(self._own, *_entry(contexts[:, i], salt, own_mask), may)
            token = may.pop()
            if may or token == NOTHING:
                return copied, bool(may)
            copied.append(token)
            text.append(token)
        return copied, False


# The kernels' hash (copy_kernels._mix, _entry) for arrays: it decides which contexts share an entry.


def _contexts(text: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Hashes of the contexts before some positions of a text. at: int64 [n] -> int64 [n, orders]"""
    back = np.arange(1, max(ORDERS) + 1)
    before = np.where(at[:, None] >= back, text[at[:, None] - back], 0)
    x = (before + (back << 32)) * 0x2545F4914F6CDD1D
    x ^= x >> 29
    return np.cumsum(x * 0x369DEA0F31A53F85, axis=1)[:, np.array(ORDERS) - 1]


def _entry(contexts: np.ndarray, salt: int, mask: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries of these contexts, and the check bits of their words. int64 [n] each"""
    x = contexts ^ (np.array([salt]) * 0x1CE4E5B9BF58476D)
    x ^= x >> 32
    x *= 0x2545F4914F6CDD1D
    x ^= x >> 30
    return x & mask, ((x >> 33) & 0x3FFFFFFF) | 0x40000000


def _note(
    table: defaultdict[int, set[int]], places: np.ndarray, checks: np.ndarray, tokens: np.ndarray, which: np.ndarray
) -> None:
    words = checks << 32 | tokens
    for place, word in zip(places[which].tolist(), words[which].tolist(), strict=True):
        table[place].add(word)


def _look_up(table: dict[int, set[int]], place: np.ndarray, check: np.ndarray, before: set[int]) -> set[int]:
    """The tokens that a lookup may find here, with those of ``before`` if it may find none. place, check: int64 [1]"""
    words = table.get(int(place[0]), {0})
    found = {word & 0x7FFFFFFF if word >> 32 == check[0] else NOTHING for word in words}
    return found if NOTHING not in found else before | (found - {NOTHING})
