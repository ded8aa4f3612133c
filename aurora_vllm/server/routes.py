"""The routes under ``/aurora``, as a vLLM endpoint plugin (entry point ``vllm.endpoint_plugins``: aurora)."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

from aurora_vllm import runtime
from aurora_vllm.errors import notice
from aurora_vllm.interop.sglang_api import SglangApi
from aurora_vllm.parent import end_with_parent
from aurora_vllm.server import metrics
from aurora_vllm.server.status import off, status
from aurora_vllm.session import Session, why_plain
from aurora_vllm.spec_decode import undrafted
from aurora_vllm.transport.control import ControlBlock
from aurora_vllm.transport.ring import RingGauge
from aurora_vllm.transport.segment import Segment, owner_pid
from aurora_vllm.versions import own_version

NOT_STARTED_BY_US = "vLLM was started by itself, or with --aurora-off"


class StatusReader:
    """Reads the shared memory of a session.

    Raises:
        FileNotFoundError, ValueError: it does not exist, or was made by another version of this package.
    """

    def __init__(self, session: Session) -> None:
        self._settings = session.config.model_dump(mode="json")
        self._run = {
            "aurora_version": own_version(),
            "vllm_version": session.vllm_version,
            "target": str(session.target),
            "draft": str(session.draft),
            "dtype": session.dtype,
        }
        self.control = ControlBlock.attach(Segment.attach(session.control))
        self._ring = RingGauge.attach(Segment.attach(session.ring))

    def read(self) -> dict[str, Any]:
        """The status of now."""
        ring = {"used": self._ring.used, "capacity": self._ring.capacity}
        return status(self.control.snapshot(), ring, self._run, self._settings, time.monotonic_ns())


class AuroraEndpoints:
    """vLLM's EndpointPlugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "aurora"
    required_tasks = None

    def __init__(self) -> None:
        self._sglang_api: SglangApi | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; without a session (plain vLLM, plugin allowed) only a status that says so."""
        session = Session.from_environment()
        if session is None:
            found = off(why_plain() or NOT_STARTED_BY_US)
            app.add_api_route("/aurora/status", lambda: JSONResponse(found, 503), methods=["GET"])
            _attach_metrics(app, lambda: found, (metrics.UP,))
            return
        # Here, because each of vLLM's API servers runs this; several are children of the process that owns the session.
        undrafted.accept_requests()
        if os.getppid() == (owner := owner_pid(session.control)):
            end_with_parent(owner)
        try:
            reader = StatusReader(session)
        except (OSError, ValueError) as error:  # raised on, it would keep vLLM from starting
            notice(f"no /aurora/status: {error}", "WARNING")
            return

        def aurora_status() -> dict[str, Any]:
            return reader.read()

        app.add_api_route("/aurora/status", aurora_status, methods=["GET"])
        if session.config.sglang_api:
            self._sglang_api = SglangApi(session, reader.control, reader.read)
            self._sglang_api.attach(app)
        _attach_metrics(app, reader.read, metrics.METRICS)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called by vLLM when the engine is up; the learner may start, if this is the process that starts it."""
        if self._sglang_api is not None:
            self._sglang_api.guard(args)
        runtime.engine_is_up.set()


def _attach_metrics(app: FastAPI, read: Callable[[], dict[str, Any]], which: Sequence[metrics.Metric]) -> None:
    """Add metrics to vLLM's page; with PROMETHEUS_MULTIPROC_DIR replace its ``GET /metrics`` by one that appends ours.

    With that variable vLLM collects from files into a registry of its own, to which no collector can be added.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        metrics.register(read, metrics=which)
        return
    own = CollectorRegistry()
    metrics.register(read, own, which)

    def all_metrics() -> Response:
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)
        return Response(generate_latest(shared) + generate_latest(own), media_type=CONTENT_TYPE_LATEST)

    app.add_api_route("/metrics", all_metrics, methods=["GET"], include_in_schema=False)
