"""A child process that the kernel kills when its parent ends, for whatever reason (prctl(2), PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent_pid: int, by: int = signal.SIGKILL) -> bool:
    """Have this process sent a signal when the *thread* that forked it ends. Survives exec.

    Args:
        parent_pid: the parent's.
        by: the signal. SIGKILL by default: nobody is left to wait for an orderly end.

    Returns:
        Whether the parent still lives. If not, it died before the call, and no signal will come.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by, 0, 0, 0)
    return os.getppid() == parent_pid
