"""Room on CPython's stack of frames, so that the calls of a step do not map and unmap memory.

Since 3.11 CPython keeps a thread's Python frames in chunks of 16 KiB. A call that does not fit maps a further chunk,
and its return unmaps it (``push_chunk`` and ``_PyThreadState_PopFrame`` in pystate.c). Where a loop happens to run at
the edge of a chunk, each of its calls pays for that. It depends on nothing but how many and how large the frames below
are: on a CPU plain vLLM 0.32's compiled model is such a place (six times a layer, docs/decisions.md), and with frames
of ours below it another one could be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
W = TypeVar("W", bound=type)

SLOTS = 1 << 15  # of 8 bytes; the chunk is twice as large, and what is left of it has room for a step's calls


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, called from a frame so large that a chunk of its own is mapped, which has room for all calls
    within. Costs one pair of system calls; memory that is not used is not touched."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(call)


def with_roomy_steps(worker: W) -> W:
    """Decorates a subclass of vLLM's worker: the two calls that make a step have room."""
    for name in ("execute_model", "sample_tokens"):
        setattr(worker, name, with_room(getattr(worker, name)))
    return worker
