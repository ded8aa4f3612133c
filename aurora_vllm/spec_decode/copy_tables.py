"""Sizes of the tables of :mod:`.device_copies`. Imports no Triton, because the plan needs them, too."""

from __future__ import annotations

from aurora_vllm.control.copy_counts import ORDERS

MOST_TOKENS = 8  # of a copied proposal, and of context: no entry of ORDERS is larger
OWN_ENTRIES = 1 << 21  # of 8 bytes: the own text of all running requests, an entry for each token and order
REQUEST_BYTES = 256  # at least what is kept of a request and of its counts


def answers_entries(answers: int) -> int:
    """Table entries for this many tokens of earlier answers: a power of two, at most half of it used; at least one."""
    return 1 << (2 * answers * len(ORDERS) - 1).bit_length() if answers else 1


def device_bytes(requests: int, answers: int) -> int:
    """Bytes that copies take on the device.

    Args:
        requests: the most that run at the same time.
        answers: tokens of earlier answers that are kept for other requests.
    """
    return 8 * (OWN_ENTRIES + answers_entries(answers)) + REQUEST_BYTES * requests
