"""Kernels are tried where a fault of theirs costs nothing, and not loaded where they failed."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode import attachment, kernel_trial
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.kernel_trial import BEGUN, main, try_kernels
from aurora_vllm.spec_decode.row_fill import TorchFill
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.transport.rows import RowLayout
from tests.unit.test_device_copying import Straw
from tests.unit.tiny_world import World, session

LAYOUT, CUDA = RowLayout(24, 3, torch.bfloat16), torch.device("cuda", 0)


@pytest.mark.parametrize(("positions", "dtype"), [(0, "float32"), (3, "bfloat16")])
def test_every_kernel_is_launched(capsys: pytest.CaptureFixture[str], positions: int, dtype: str) -> None:
    """Here by Triton's interpreter."""
    assert main("cpu", 24, 3, dtype, positions) == 0
    assert capsys.readouterr().out == f"{BEGUN}\n"


@pytest.mark.parametrize(
    ("outcome", "why_not"),
    [
        ((0, BEGUN, ""), ""),
        ((-11, BEGUN, ""), "exit code -11"),
        (
            (1, BEGUN, "Traceback (most recent call last):\n  x\nAcceleratorError: illegal\nadvice\n"),
            "AcceleratorError: illegal",
        ),
        ((1, "", "Traceback (most recent call last):\n  x\nRuntimeError: exclusive\n"), ""),  # it never came to them
        (subprocess.TimeoutExpired([], 9.0, BEGUN.encode()), "they did not end within 9 s"),
        (subprocess.TimeoutExpired([], 9.0, None), ""),
    ],
)
def test_what_speaks_against_them(monkeypatch: pytest.MonkeyPatch, outcome: Any, why_not: str) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[3:])
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(returncode=outcome[0], stdout=outcome[1].encode(), stderr=outcome[2].encode())

    monkeypatch.setattr(kernel_trial.subprocess, "run", run)
    assert try_kernels(LAYOUT, CUDA, 8, timeout_s=9.0) == why_not
    assert asked == [["cuda:0", "24", "3", "bfloat16", "8"]]
    assert try_kernels(LAYOUT, torch.device("cpu"), 8) == "" and len(asked) == 1


def test_the_process_is_started_as_it_is_written() -> None:
    command = [kernel_trial.sys.executable, "-m", kernel_trial.__name__, "cuda:0", "24", "3", "bfloat16", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode and BEGUN not in done.stdout  # there is no such device here


def test_a_worker_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(attachment, "try_kernels", lambda *_: "illegal access")
    told: list[bool] = []
    monkeypatch.setattr(attachment, "prepare_fill", lambda *given: told.append(given[-1]) or TorchFill(given[0]))
    with session(World(), tmp_path, prompt_lookup=True) as (current, _):
        worker = Attachment(current, Straw(), V2Adapter)
        worker.start_serving()
        assert worker.serving and told == [False]
        assert worker._copying is None and not worker.control.worker.copies_on_device
        worker.close()
    assert "(illegal access): nothing is copied, rows are written by torch" in caplog.text
