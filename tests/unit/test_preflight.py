"""What is checked before a model is loaded: flags, logits processors, API servers, the port."""

from __future__ import annotations

import socket
from argparse import Namespace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from aurora_vllm import preflight
from aurora_vllm.config import AuroraConfig
from aurora_vllm.errors import AuroraError
from tests.unit.vllm_arguments import ARGS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2"),
        ({"headless": True}, "--headless"),
        ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker"),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls my.Scheduler"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], said: str) -> None:
    preflight.check_supported(Namespace(**ARGS), AuroraConfig())
    with pytest.raises(AuroraError) as caught:
        preflight.check_supported(Namespace(**(ARGS | change)), AuroraConfig())
    assert str(caught.value) == f"Aurora does not support {said} yet; --aurora-off serves it as plain vLLM"


def test_a_learner_has_no_more_threads_than_there_are_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    preflight.check_supported(Namespace(**ARGS), AuroraConfig(learner_threads=2))
    with pytest.raises(AuroraError) as caught:
        preflight.check_supported(Namespace(**ARGS), AuroraConfig(learner_threads=3))
    assert str(caught.value) == "--aurora-learner-threads: there are 2 CPUs for it, not 3"


def test_our_own_classes_are_supported() -> None:
    ours = {"worker_cls": preflight.WORKER_CLASS, "scheduler_cls": preflight.SCHEDULER_CLASS}
    preflight.check_supported(Namespace(**(ARGS | ours)), AuroraConfig())


def test_installed_logits_processors_are_not_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("guard", "m:f", "vllm.logits_processors")
    monkeypatch.setattr(preflight, "entry_points", lambda group: [point] if group == point.group else [])
    with pytest.raises(
        AuroraError, match=r"leaves installed logits processors out where it speculates \(guard\); --aurora-off"
    ):
        preflight.check_supported(Namespace(**ARGS), AuroraConfig())


def test_several_api_servers_are_but_for_sglangs_endpoints() -> None:
    for count in (None, 1, 2):
        preflight.check_supported(Namespace(**(ARGS | {"api_server_count": count})), AuroraConfig())
    sglang = AuroraConfig(sglang_api=True)
    preflight.check_supported(Namespace(**(ARGS | {"api_server_count": 1})), sglang)
    with pytest.raises(AuroraError, match="--api-server-count 2 beside --aurora-sglang-api, which is one server's"):
        preflight.check_supported(Namespace(**(ARGS | {"api_server_count": 2})), sglang)
    with pytest.raises(AuroraError, match="--api-server-count 0;"):  # to vLLM that is --headless
        preflight.check_supported(Namespace(**(ARGS | {"api_server_count": 0})), AuroraConfig())


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = Namespace(**(ARGS | {"port": port}))
        with pytest.raises(AuroraError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; choose"):
            preflight.check_port(taken)
    preflight.check_port(taken)
    with pytest.raises(AuroraError, match=r"cannot listen on 203\.0\.113\.1:1"):
        preflight.check_port(Namespace(**(ARGS | {"host": "203.0.113.1", "port": 1})))
    (tmp_path / "socket").touch()
    with pytest.raises(AuroraError, match="exists already"):
        preflight.check_port(Namespace(**(ARGS | {"uds": str(tmp_path / "socket")})))


def test_a_port_of_a_server_that_has_just_ended_is_free() -> None:
    """Its connections linger in TIME_WAIT for a minute; vLLM's own socket does not mind, so neither may the check."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    preflight.check_port(Namespace(**(ARGS | {"port": port})))


def test_no_room_in_shared_memory_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_shared_memory(1)
    monkeypatch.setattr(preflight, "free_bytes", lambda: 64 << 20)
    with pytest.raises(AuroraError, match=r"want 310 MiB .* has 64 free; give it more room"):
        preflight.check_shared_memory(310 << 20)
