"""Waiting for work on a GPU without using a CPU core, and not for ever if the other process is dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from aurora_vllm.errors import first_line

GRACE_S = 2.0  # after the owner's death, for work that was enqueued before it


class OwnerGone(RuntimeError):
    """The process that made the memory died, and work on the memory fails or does not end."""


def wait_for_this_stream(device: torch.device) -> None:
    """Return when the work enqueued on this thread's current stream is done; on the CPU, at once.

    The thread sleeps and holds no lock. By default CUDA would let it spin, beside the thread that drives the engine.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.Event(blocking=True)
    done.record(torch.cuda.current_stream(device))
    done.synchronize()


def wait_until(done: Callable[[], bool], owner_lives: Callable[[], bool], grace_s: float = GRACE_S) -> None:
    """Poll until it is done.

    Raises:
        OwnerGone: the owner is dead, and `grace_s` after that was noticed it still is not done.
    """
    patience: float | None = None
    while not done():
        now = time.monotonic()
        if patience is None and not owner_lives():
            patience = now + grace_s
        if patience is not None and now > patience:
            raise OwnerGone("the process that made the device memory died, and work that waits for it does not end")
        time.sleep(50e-6)


@contextmanager
def blaming(owner_lives: Callable[[], bool]) -> Iterator[None]:
    """A context in which errors are blamed on the memory's owner if that is dead: calls then may fail instead of
    waiting for ever.

    Raises:
        OwnerGone: a call failed, and the owner is dead, or dies within GRACE_S (the driver may notice it first).
    """
    try:
        yield
    except OwnerGone:
        raise
    except RuntimeError as error:
        patience = time.monotonic() + GRACE_S
        while owner_lives():
            if time.monotonic() > patience:
                raise
            time.sleep(0.01)
        raise OwnerGone(f"the process that made the device memory died: {first_line(error)}") from error
