"""The answer of ``GET /aurora/status``: the control block for people and programs. Pure functions of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A learner without a heartbeat for longer is reported as down. That long, because a piece of a lesson takes its time;
# one that died is reported at once.
LEARNER_DOWN_S = 60.0

# Where the worker has left no message: it may not even have been able to open the control block.
NOT_ATTACHED = "the worker has not attached: it is starting, or its log says why"

Snapshot = Mapping[str, Mapping[str, Any]]


def status(
    snapshot: Snapshot, ring: Mapping[str, int], run: Mapping[str, Any], settings: Mapping[str, Any], now_ns: int
) -> dict[str, Any]:
    """The whole answer.

    Args:
        snapshot: ``ControlBlock.snapshot()``.
        ring: rows ``used`` and ``capacity`` of the trace ring.
        run: the constants of a run (versions of the software, target, draft, dtype).
        settings: AuroraConfig as plain values.
        now_ns: ``time.monotonic_ns()``, the clock of all times in the control block.
    """
    worker, scheduler = snapshot["worker"], snapshot["scheduler"]
    return {
        "aurora": "on",
        **run,
        "versions": versions(snapshot),
        "speculation": {
            "draft_length": scheduler["draft_length"],
            "reason": scheduler["reason"],
            **_take(scheduler, "steps", "spec_steps", "generated_tokens"),
            **_take(scheduler, "copying", "copied_drafts", "copied_tokens", "copied_accepted"),
        },
        "capture": {
            "on": worker["capture_on"],
            "errors": worker["capture_errors"],
            "message": worker["message"] or ("" if worker["attached"] else NOT_ATTACHED),
            **_take(
                worker, "requests_seen", "requests_captured", "requests_dropped", "requests_opted_out", "rows_written"
            ),
        },
        "ring": {**ring, "used_share": ring["used"] / ring["capacity"] if ring["capacity"] else 0.0},
        "swaps": {
            **_take(worker, "swaps", "refusals", "refusal"),
            "last_swap_stall_s": worker["last_swap_stall_us"] / 1e6,
            "last_swap_age_s": age(worker["last_swap_ns"], now_ns),
        },
        "rollout": {
            **_take(scheduler, "probation", "probation_version", "probation_drafts", "probation_evidence"),
            **_take(worker, "rollbacks", "rolled_back_version", "rollback"),
        },
        "worker": {
            **_take(worker, "pid", "attached", "model_runner", "step", "memory_device"),
            # It beats once a step: an old heartbeat of an idle server is no fault.
            "heartbeat_age_s": age(worker["heartbeat_ns"], now_ns),
        },
        "guard": _take(scheduler, "learner_share", "learner_earnings", "learner_slowdown", "learner_guard"),
        "learner": learner(snapshot, bool(settings["learn"]), now_ns),
        "config": dict(settings),
    }


def versions(snapshot: Snapshot) -> dict[str, Any]:
    """The live, previous and published versions of the draft, and the acceptance of each."""
    worker, scheduler, trained = snapshot["worker"], snapshot["scheduler"], snapshot["learner"]
    return {
        "live": worker["live_version"],
        "previous": worker["previous_version"],
        "published": trained["published_version"],
        "acceptance": [dict(row) for row in scheduler["acceptance"]],
        "total": _take(
            scheduler["acceptance_total"], "num_drafts", "num_draft_tokens", "num_accepted", "accepted_per_position"
        ),
    }


def learner(snapshot: Snapshot, wanted: bool, now_ns: int) -> dict[str, Any]:
    """The learner's fields; ``state`` is "off" (by the settings), "waiting" (for the engine), "starting", "down", or
    what the learner reports."""
    fields, server = dict(snapshot["learner"]), snapshot["server"]
    heartbeat_age = age(fields.pop("heartbeat_ns"), now_ns)
    fields.pop("update_answer", None)  # the answer to one request
    running = server["learner_pid"]
    # The block outlives a learner: it describes the running one only if the pids agree.
    alive = running != 0 and fields["pid"] == running and heartbeat_age is not None and heartbeat_age <= LEARNER_DOWN_S
    if not wanted:
        state = "off"
    elif alive:
        state = fields["state"] or "starting"
    elif running and fields["pid"] != running:
        state = "starting"
    elif not running and not server["learner_restarts"]:
        state = "waiting"
    else:
        state = "down"
    return {
        **fields,
        "state": state,
        "alive": alive if wanted else None,
        "heartbeat_age_s": heartbeat_age,
        "pid": server["learner_pid"],
        "restarts": server["learner_restarts"],
    }


def off(reason: str) -> dict[str, Any]:
    """The answer if vLLM is served plain."""
    return {"aurora": "off", "reason": reason}


def age(then_ns: int, now_ns: int) -> float | None:
    """Seconds since a time in the control block; None if it is not set."""
    return max(0.0, (now_ns - then_ns) / 1e9) if then_ns else None


def _take(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names}
