"""Found by each Python process that run.sh starts: its children and threads run on the GPU made of software."""

from __future__ import annotations

import multiprocessing.process
import sys
import threading
from typing import Any

_process, _thread = multiprocessing.process.BaseProcess.run, threading.Thread.run


def _run_process(self: Any) -> None:
    import softgpu

    softgpu.softly(_process)(self)


def _run_thread(self: Any) -> None:
    if "torch" not in sys.modules:
        _thread(self)
        return
    import softgpu

    softgpu.softly(_thread)(self)


multiprocessing.process.BaseProcess.run = _run_process
threading.Thread.run = _run_thread
