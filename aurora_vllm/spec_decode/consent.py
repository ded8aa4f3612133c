"""Whether a request may be learned from: ``vllm_xargs: {"aurora_learn": false}`` keeps it out.

A ``cache_salt``, vLLM's way not to share a cache with others, keeps it from copying others, and others from copying it.
Only the scheduler sees the salt; for the worker it is noted among the request's ``vllm_xargs``.
"""

from __future__ import annotations

from typing import Any

LEARN_KEY = "aurora_learn"
CONSENT = ("true", "1", "1.0", "yes", "on")
_PRIVATE_KEY = "aurora_private"


def may_learn(params: Any) -> bool:
    """Whether the request may be learned from. A value that is not understood counts as no.

    Requests for a single token never are: they have no decode step to learn from, and vLLM splits beam searches and
    scorings into such requests without carrying over the client's wish.

    Args:
        params: vLLM's SamplingParams, or None for a request that samples nothing.
    """
    wish = ((params.extra_args if params is not None else None) or {}).get(LEARN_KEY, True)
    return str(wish).strip().lower() in CONSENT and getattr(params, "max_tokens", None) != 1


def note_salt(request: Any, before: Any = None) -> None:
    """If a vLLM Request has a ``cache_salt``, note that in its SamplingParams, which the worker receives.

    Args:
        request: the new one.
        before: the request of the same id that it continues, if any (streaming input); its salt counts, too.
    """
    params = getattr(request, "sampling_params", None)
    if params is not None and any(getattr(one, "cache_salt", None) for one in (request, before)):
        params.extra_args = {**(params.extra_args or {}), _PRIVATE_KEY: True}


def is_private(params: Any) -> bool:
    """Whether a request may neither copy others nor be copied. params: SamplingParams, after :func:`note_salt`."""
    return bool((params.extra_args or {}).get(_PRIVATE_KEY))
