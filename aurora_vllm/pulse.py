"""Detects a child process that hangs."""

from __future__ import annotations

from collections.abc import Callable

from aurora_vllm.proc_stat import cpu_seconds


class Pulse:
    """Watches a process that has a heartbeat.

    Between two beats it may do a piece of work that takes long, and very long on a machine under full load. So it is
    said to hang only if it uses no CPU at all meanwhile, or more than any piece of work takes.

    Args:
        pid: of a child of this process.
        heartbeat: a number that the process changes now and then.
        idle_looks: looks in a row without a beat or any CPU time after which it hangs. They are counted, not timed:
            while a container is paused, the clock goes on and nothing else does.
        busy_s: CPU seconds without a beat after which it hangs.
    """

    def __init__(self, pid: int, heartbeat: Callable[[], int], idle_looks: float, busy_s: float) -> None:
        self._pid, self._heartbeat = pid, heartbeat
        self._idle_looks, self._busy_s = idle_looks, busy_s
        self._beat, self._looks = heartbeat(), 0
        self._cpu = self._cpu_at_beat = cpu_seconds(pid)

    def hangs(self) -> bool:
        """Look once. To be called at a steady pace."""
        beat, cpu = self._heartbeat(), cpu_seconds(self._pid)
        if beat != self._beat:
            self._beat, self._cpu_at_beat = beat, cpu
        elif cpu == self._cpu:
            self._looks += 1
            return self._looks > self._idle_looks
        self._cpu, self._looks = cpu, 0
        return cpu - self._cpu_at_beat > self._busy_s
