"""Whether a request may be learned from: ``vllm_xargs: {"aurora_learn": false}`` keeps it out."""

from __future__ import annotations

from typing import Any

LEARN_KEY = "aurora_learn"


def may_learn(params: Any) -> bool:
    """params: vLLM's SamplingParams, or None for a request that samples nothing."""
    wish = ((params.extra_args if params is not None else None) or {}).get(LEARN_KEY, True)
    return str(wish).lower() not in ("false", "0", "no")
