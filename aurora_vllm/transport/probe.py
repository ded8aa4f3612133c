"""A trial whether another process can open device memory.

What may prevent it (a container without IPC, a GPU in exclusive mode, no room for a second context) shows only in a
second process. So one is started that does nothing else, before anything is stored in that memory::

    python -m aurora_vllm.transport.probe DEVICE NAME...
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import torch

from aurora_vllm.transport.cuda import NoDeviceMemory
from aurora_vllm.transport.memory import memory_for

TIMEOUT_S = 120.0  # importing torch and making a context takes seconds


def try_elsewhere(device: torch.device, names: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
    """Have another process open device memory of this one.

    Raises:
        NoDeviceMemory: it cannot, or did not end in time.
    """
    command = [sys.executable, "-m", __name__, str(device), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise NoDeviceMemory(f"another process did not open it within {timeout_s:g} s") from None
    if done.returncode:
        why = exception_line(done.stderr) or f"exit code {done.returncode}"
        raise NoDeviceMemory(f"another process cannot open it: {why}")


def exception_line(stderr: str) -> str:
    """The line of stderr that names the exception, else its last line, or "".

    A CUDA exception continues for some lines after that, the last of them advice on debugging torch.
    """
    _, traceback, behind = stderr.rpartition("Traceback (most recent call last):\n")
    named = [line for line in behind.splitlines() if line.strip() and not line[0].isspace()]
    return "".join(named[:1] if traceback else stderr.strip().splitlines()[-1:])


def main(device: str, names: Sequence[str]) -> int:
    place = memory_for(torch.device(device))
    if place is None:
        print(f"nothing is shared on {device}", file=sys.stderr)
        return 1
    for name in names:
        place.open(name).settle()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
