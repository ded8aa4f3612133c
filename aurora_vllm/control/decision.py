"""What is decided for a step, and why, in words: people read the reason in ``/aurora/status``."""

from __future__ import annotations

from dataclasses import dataclass

from aurora_vllm.control.rating import Plan


@dataclass(frozen=True)
class Decision:
    """A draft length and, in words, why.

    ``draft_length``: tokens for which the draft model runs; 0 where copies alone are proposed.
    ``proposals``: "whole": verified as they are; "worthwhile": cut to what pays; "none": not verified.
    ``sits_out``: there is no drafting now or soon, so the draft need not run over prompts to fill its KV cache.
    ``proposed``: tokens to schedule for every request's proposal; at least ``draft_length``.
    """

    draft_length: int
    reason: str
    proposals: str = "worthwhile"
    sits_out: bool = False
    proposed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "proposed", max(self.proposed, self.draft_length))


def reason_for(bucket: int, chosen: Plan, drafting: Plan, uniform: bool) -> str:
    """Why a plan was chosen.

    Args:
        bucket: of the batch size.
        drafting: the best plan that drafts.
        uniform: all proposals of a batch have one length.
    """
    shown = chosen if chosen.drafted else drafting
    promise = f"K={shown.drafted} gives {shown.gain:.2f}x of plain decoding"
    if chosen.drafted:
        return f"drafting pays at batch {bucket}: {promise} ({chosen.tokens:.2f} tokens a request and step)"
    if chosen.verified:
        length = f" with proposals of {chosen.proposed}" if uniform else ""
        return f"copying alone pays at batch {bucket}: it gives {chosen.gain:.2f}x{length}, {promise}"
    return f"drafting does not pay at batch {bucket}: {promise}"
