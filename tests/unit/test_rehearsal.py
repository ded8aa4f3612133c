"""Capture is rehearsed before a worker serves, and the kernel for rows is used only if its rows are right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_vllm.spec_decode import attachment, rehearsal
from aurora_vllm.spec_decode.attachment import Attachment
from aurora_vllm.spec_decode.capture_kernel import KernelFill
from aurora_vllm.spec_decode.rehearsal import prepare_fill, rehearse
from aurora_vllm.spec_decode.row_fill import RowFill, TorchFill
from aurora_vllm.spec_decode.runner_v2 import V2Adapter
from aurora_vllm.transport.rows import RowLayout
from tests.unit.test_runner_v2 import StrawRunner
from tests.unit.tiny_world import World, session

CPU = torch.device("cpu")


def test_the_rehearsal_has_steps_of_every_kind() -> None:
    layout = RowLayout(24, 3, torch.bfloat16)
    rows = rehearse(TorchFill(layout), layout, CPU, CPU)
    meta = layout.meta(rows)
    assert torch.equal(rehearse(KernelFill(layout), layout, CPU, CPU), rows)
    assert {int(flags) for flags in meta[:, 2]} == {0, 1, 2}
    assert len(layout.states(rows).unique(dim=0)) > 10


class Pretended:
    """Devices that are none: nothing is rehearsed, and each way to fill rows writes what it is said to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], compiled: bool = True) -> None:
        self.reserved: list[int] = []
        self.rehearsed: list[str] = []

        def act(fill: RowFill, *_: Any) -> torch.Tensor:
            self.rehearsed.append(fill.name)
            if isinstance(written[fill.name], Exception):
                raise written[fill.name]
            return torch.tensor(written[fill.name])

        monkeypatch.setattr(rehearsal, "rehearse", act)
        monkeypatch.setattr(rehearsal, "reserve_pinned", lambda size, device: self.reserved.append(size))
        monkeypatch.setattr("aurora_vllm.spec_decode.capture_kernel.COMPILED", compiled)


LAYOUT, CUDA = RowLayout(24, 3, torch.bfloat16), torch.device("cuda")


def test_a_kernel_that_writes_what_torch_writes_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, {"torch": [1], "one kernel": [1]})
    assert isinstance(prepare_fill(LAYOUT, CUDA, CUDA, 8192), KernelFill)
    assert pretended.rehearsed == ["torch", "one kernel"] and 8192 * 64 < pretended.reserved[0] < 2**20


@pytest.mark.parametrize(
    ("written", "compiled", "says"),
    [
        ({"torch": [1], "one kernel": [2]}, True, "it writes other rows than torch does"),
        ({"torch": [1], "one kernel": RuntimeError("no compiler")}, True, "RuntimeError: no compiler"),
        ({"torch": RuntimeError("no CUDA"), "one kernel": [1]}, True, "RuntimeError: no CUDA"),
        ({"torch": [1], "one kernel": [1]}, False, "Triton interprets its kernels here"),
    ],
)
def test_else_it_is_torch_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    written: dict[str, Any],
    compiled: bool,
    says: str,
) -> None:
    Pretended(monkeypatch, written, compiled)
    with caplog.at_level(logging.WARNING):
        assert isinstance(prepare_fill(LAYOUT, CUDA, CUDA, 8192), TorchFill)
    assert says in caplog.text


def test_a_ring_on_the_host_is_filled_by_torch_and_rehearsed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretended = Pretended(monkeypatch, {"torch": [1]})
    assert isinstance(prepare_fill(LAYOUT, CPU, CUDA, 8192), TorchFill)
    assert pretended.rehearsed == ["torch"] and not caplog.text
    assert isinstance(prepare_fill(LAYOUT, CUDA, CUDA, 8192, with_kernel=False), TorchFill)
    assert pretended.rehearsed == ["torch", "torch"] and not caplog.text
    pretended.rehearsed.pop(), pretended.reserved.pop()
    assert isinstance(prepare_fill(LAYOUT, CPU, CPU, 8192), TorchFill)
    assert pretended.rehearsed == ["torch"] and len(pretended.reserved) == 1  # nothing waits on a CPU


@pytest.mark.parametrize("learn", [True, False])
def test_a_worker_rehearses_before_it_serves_if_anything_will_be_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: bool
) -> None:
    asked: list[Any] = []

    def prepare(*arguments: Any) -> RowFill:
        asked.append(arguments)
        return TorchFill(arguments[0])

    monkeypatch.setattr(attachment, "prepare_fill", prepare)
    with session(World(), tmp_path, learn=learn) as (shared, _):
        runner: Any = StrawRunner()
        runner.max_num_tokens = 321
        worker = Attachment(shared, runner, V2Adapter)
        worker.start_serving()
        assert worker.serving and worker.writer.rows_by == "torch"
        assert asked == [(shared.row_layout, CPU, CPU, 321, True)] * learn
        worker.close()
