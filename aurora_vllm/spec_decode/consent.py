"""Whether a request may be learned from: ``vllm_xargs: {"aurora_learn": false}`` keeps it out.

A ``cache_salt``, vLLM's way to share no cache with others, keeps it from copying them, and others from copying it. The
scheduler knows that one; for the worker it is noted beside the wish.
"""

from __future__ import annotations

from typing import Any

LEARN_KEY = "aurora_learn"
CONSENT = ("true", "1", "1.0", "yes", "on")
_PRIVATE_KEY = "aurora_private"


def may_learn(params: Any) -> bool:
    """A wish that is not understood is one to be kept out.

    A request for one token has no decode step to learn a draft from. And vLLM makes such requests of a beam search or a
    scoring, into which the client's own wish is not carried over.

    Args:
        params: vLLM's SamplingParams, or None for a request that samples nothing.
    """
    wish = ((params.extra_args if params is not None else None) or {}).get(LEARN_KEY, True)
    return str(wish).strip().lower() in CONSENT and getattr(params, "max_tokens", None) != 1


def note_salt(request: Any, before: Any = None) -> None:
    """Where a vLLM Request has a ``cache_salt``, say so in its SamplingParams, which the worker is given.

    Args:
        request: that comes.
        before: of the same id, where it goes on with one (streaming input): its salt is the session's.
    """
    params = getattr(request, "sampling_params", None)
    if params is not None and any(getattr(one, "cache_salt", None) for one in (request, before)):
        params.extra_args = {**(params.extra_args or {}), _PRIVATE_KEY: True}


def is_private(params: Any) -> bool:
    """Whether it neither copies from others nor is copied. params: SamplingParams that went through note_salt."""
    return bool((params.extra_args or {}).get(_PRIVATE_KEY))
