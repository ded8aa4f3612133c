"""Whether a draft could pay at all: what a good one would gain at present prices, beside the present copies.

Learning costs serving time now and pays later, if drafting can pay. Where verifying is expensive (a small model, a
large batch) or copies save most of what can be saved, even a good draft would gain nothing, and that is known before
anything is learned. Numbers in, numbers out.
"""

from __future__ import annotations

import itertools
import operator

from aurora_vllm.control.copying import Copies
from aurora_vllm.control.rating import Offer, Rating

GOOD = 0.7  # chance of each token given those before it, as trained EAGLE-3 drafts have it (Li et al., 2025)


def prospect(rating: Rating, copies: Copies | None, positions: int) -> float:
    """The rate over plain decoding's of the best draft length, if the draft were good.

    Args:
        rating: at the present batch size.
        copies: taken instead of the draft's tokens where more of them are expected to be right; None for none.
        positions: largest draft length.
    """
    chain = list(itertools.accumulate([GOOD] * positions, operator.mul))
    offers = []
    for kind, share in copies.shares() if copies is not None else [(0, 1.0)]:
        copied = copies.chain(kind) if copies is not None and kind else []
        is_better = sum(copied) > sum(chain)
        offers.append(Offer(share, is_better, copied if is_better else chain))
    return max(rating.plan(k, k, offers).gain for k in range(1, positions + 1))
