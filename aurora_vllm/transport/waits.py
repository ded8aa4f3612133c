"""Waits for work on a GPU that take no core from anybody, and do not go on for ever once a process is dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from aurora_vllm.errors import first_line

GRACE_S = 2.0  # after the owner's death, for work that was enqueued before it


class OwnerGone(RuntimeError):
    """The process that made the memory died, and work on it fails or does not come to an end."""


def wait_for_this_stream(device: torch.device) -> None:
    """Return when what this thread told its current stream is done; at once where the device is the CPU.

    The thread sleeps and holds no lock: by itself CUDA would have it spin, beside the thread that drives the engine.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.Event(blocking=True)
    done.record(torch.cuda.current_stream(device))
    done.synchronize()


def wait_until(done: Callable[[], bool], owner_lives: Callable[[], bool], grace_s: float = GRACE_S) -> None:
    """Poll until it is done.

    Raises:
        OwnerGone: the owner is dead, and it was not done for `grace_s` after that was noticed.
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
    """What is called within this on memory of an owner that died may fail, too, instead of going on for ever.

    Raises:
        OwnerGone: it failed, and the owner is dead, or is within GRACE_S: the driver may know it first.
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
