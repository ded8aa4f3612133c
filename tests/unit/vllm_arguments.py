"""What vLLM's command line comes to, as far as Aurora looks at it."""

from __future__ import annotations

from typing import Any

ARGS: dict[str, Any] = {
    "model": "/nowhere/model",
    "revision": None,
    "download_dir": None,
    "host": "127.0.0.1",
    "port": 0,
    "uds": None,
    "tensor_parallel_size": 1,
    "api_server_count": None,
    "worker_cls": "auto",
    "scheduler_cls": None,
    "speculative_config": None,
    "shutdown_timeout": 0,
}
