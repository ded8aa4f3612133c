"""Whether a process that ought to be at work still is."""

from __future__ import annotations

from collections.abc import Callable

from aurora_vllm.proc_stat import cpu_seconds


class Pulse:
    """Watches a process that says now and then that it lives.

    Between two such words it may be at a piece of work that takes long, beside a full load very long. So it hangs only
    where it uses no CPU at all, or more than any piece of work does.

    Args:
        pid: of a child of this process.
        heartbeat: what it says: a number that changes.
        idle_looks: looks in a row that find neither another heartbeat nor more CPU time, after which it hangs. Looks,
            not seconds: while a container is paused the clock goes on, and nobody's heart beats.
        busy_s: CPU seconds without another heartbeat, after which it hangs.
    """

    def __init__(self, pid: int, heartbeat: Callable[[], int], idle_looks: float, busy_s: float) -> None:
        self._pid, self._heartbeat = pid, heartbeat
        self._idle_looks, self._busy_s = idle_looks, busy_s
        self._beat, self._looks = heartbeat(), 0
        self._cpu = self._cpu_at_beat = cpu_seconds(pid)

    def hangs(self) -> bool:
        """One look. They come at a steady pace."""
        beat, cpu = self._heartbeat(), cpu_seconds(self._pid)
        if beat != self._beat:
            self._beat, self._cpu_at_beat = beat, cpu
        elif cpu == self._cpu:
            self._looks += 1
            return self._looks > self._idle_looks
        self._cpu, self._looks = cpu, 0
        return cpu - self._cpu_at_beat > self._busy_s
