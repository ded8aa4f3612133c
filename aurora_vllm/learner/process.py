"""The learner process: ``python -m aurora_vllm.learner.process``, started and supervised by the server.

The learner keeps to its share of a CPU, and may die at any moment: the server goes on, and the next learner begins with
the current version and with what was saved of its training.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial

import torch

from aurora_vllm.errors import AuroraError, report
from aurora_vllm.learner.learner import Learner
from aurora_vllm.session import Session


def main() -> int:
    """Learn until told to stop."""
    session = Session.from_environment()
    if session is None:
        print(
            "aurora_vllm: error: the learner is started by the server; run python -m aurora_vllm.entrypoint",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(session.config.learner_threads)
    torch.manual_seed(session.config.seed)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        learner = Learner(session)
    except AuroraError as error:
        return report(error)
    signal.signal(signal.SIGCONT, lambda *_: learner.budget.continues())
    learner.control.learner.pid = os.getpid()
    scheduler, rests = learner.control.scheduler, False
    while not stop.is_set():
        learner.control.learner.working = not rests
        turn = partial(learner.turn, rests)
        worked = learner.gpu_time.run(turn) if learner.gpu_time else turn()
        learner.keeper.save()
        pause = learner.budget.debt(scheduler.steps, scheduler.learner_share or 1.0, scheduler.in_flight)
        rests = learner.budget.owes_more
        pause = pause if worked else max(pause, learner.sleep.idle_s)
        learner.control.learner.working = not pause
        stop.wait(pause)
    learner.keeper.save(at_once=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
