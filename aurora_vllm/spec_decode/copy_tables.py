"""How large the tables of :mod:`.device_copies` are. For the plan, too, which is made where there is no Triton."""

from __future__ import annotations

from aurora_vllm.control.copy_counts import ORDERS

MOST_TOKENS = 8  # of a copied proposal, and as many of context: ORDERS holds none longer
OWN_ENTRIES = 1 << 21  # of 8 bytes: the own text of all running requests, an entry for each token and order
REQUEST_BYTES = 256  # at least what is kept of a request and of its counts


def answers_entries(answers: int) -> int:
    """Entries for so many tokens of earlier answers, a power of two of which at most half is used; at least one."""
    return 1 << (2 * answers * len(ORDERS) - 1).bit_length() if answers else 1


def device_bytes(requests: int, answers: int) -> int:
    """What copies take on the device.

    Args:
        requests: that run at the same time at most.
        answers: tokens of earlier answers that are kept for others.
    """
    return 8 * (OWN_ENTRIES + answers_entries(answers)) + REQUEST_BYTES * requests
