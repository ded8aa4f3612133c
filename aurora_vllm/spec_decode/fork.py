"""Functions called by a vLLM with ``patches/vllm-VERSION.patch``, for people who keep a fork of vLLM.

On an unmodified vLLM the same is done from outside, by ``--worker-cls`` (:mod:`.worker`), ``--scheduler-cls``
(:mod:`.scheduler`) and wrapped runner methods (:mod:`.runner_v1`). With these classes a patched vLLM's own calls do
nothing, so nothing is hooked twice. Imports no vLLM, since vLLM's modules import this one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aurora_vllm.session import Session
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.mends import mend

if TYPE_CHECKING:
    from aurora_vllm.spec_decode.advisor import SpeculationAdvisor

logger = logging.getLogger("vllm.aurora")


def attach(worker: Any) -> Attachment | None:
    """Called after ``Worker.load_model``. None without a session, without anything to attach to, or in an
    AuroraWorker."""
    if _is_ours(worker) or Session.from_environment() is None:
        return None
    try:
        mend(worker)
        return Attachment.to_worker(worker)
    except Exception:
        logger.exception("aurora: could not attach; serving goes on as plain vLLM")
        return None


def advise(scheduler: Any) -> SpeculationAdvisor | None:
    """Called at the end of ``Scheduler.__init__``; see :func:`.scheduler.advise`. None as in :func:`attach`."""
    if _is_ours(scheduler) or Session.from_environment() is None:
        return None
    from aurora_vllm.spec_decode import scheduler as ours

    return ours.advise(scheduler)


def _is_ours(thing: object) -> bool:
    return any(base.__module__.startswith("aurora_vllm.") for base in type(thing).__mro__)
