"""Wrapping a method of one object, as the runner adapters do with vLLM's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from aurora_vllm.spec_decode.trace import StepTrace

OnStep = Callable[[Callable[[], StepTrace]], None]  # takes a function that builds a step's record; must not raise


def wrap(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``replacement(original, ...)`` and looks like the original."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return wrapped
