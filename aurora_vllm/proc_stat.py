"""What the kernel says of a process: ``/proc/PID/stat``, see proc_pid_stat(5)."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_S = os.sysconf("SC_CLK_TCK")


def stat_fields(pid: int) -> list[str]:
    """The fields from the third on (state, parent, ...); empty where there is no such process, or /proc hides it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # the command, in parentheses, may hold spaces and parentheses


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] not in "ZX"


def process_start_time(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot (field 22); None for a dead or a hidden one."""
    fields = stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads so far (fields 14 and 15: utime, stime); 0 where there is no such process."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_S if fields else 0.0
