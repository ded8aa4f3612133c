"""A child process that the kernel ends with its parent, whatever ends that (prctl(2), PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent_pid: int) -> bool:
    """Have this process killed when the *thread* that forked it ends. Survives exec.

    SIGKILL, because nobody is left to wait for it, or to hear what it says.

    Args:
        parent_pid: whose child it is.

    Returns:
        Whether it is still that child; else its parent died before the call, and nothing will come.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_pid
