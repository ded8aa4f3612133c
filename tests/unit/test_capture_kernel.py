"""One kernel writes the rows that torch's operators write, byte for byte. Through Triton's interpreter."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aurora_vllm.spec_decode.capture_kernel import KernelFill
from aurora_vllm.spec_decode.row_fill import RowFill, TorchFill
from aurora_vllm.spec_decode.trace import StepTrace
from aurora_vllm.transport.rows import RowLayout
from tests.unit.capture_world import layout_of, step_of, writer_of


def by_kernel_alone(layout: RowLayout) -> KernelFill:
    fill = KernelFill(layout)
    fill._torch = None  # type: ignore[assignment]
    return fill


def rows_of(layout: RowLayout, fill: RowFill, steps: list[StepTrace], opted_out: int = 0) -> torch.Tensor:
    writer, sink = writer_of(layout, fill, "cpu", opted_out)
    for step in steps:
        writer.write(step)
    for i in range(4):
        writer.end(f"r{i}")
    writer.flush_ends()
    return sink.all()


@settings(max_examples=150)
@given(rng=st.randoms(use_true_random=False), opted_out=st.integers(0, 15))
def test_rows_are_those_of_torch(rng: random.Random, opted_out: int) -> None:
    layout = layout_of(rng)
    steps = [step_of(rng, layout, "cpu") for _ in range(rng.randint(1, 3))]
    expected = rows_of(layout, TorchFill(layout), steps, opted_out)
    assert torch.equal(rows_of(layout, by_kernel_alone(layout), steps, opted_out), expected)


@pytest.mark.parametrize("hidden", [4096, 4100, 6143])
def test_states_longer_than_a_program_copies_at_once(hidden: int) -> None:
    rng, layout = random.Random(hidden), RowLayout(hidden, 1, torch.float32 if hidden % 2 else torch.bfloat16)
    steps = [step_of(rng, layout, "cpu")]
    assert torch.equal(rows_of(layout, by_kernel_alone(layout), steps), rows_of(layout, TorchFill(layout), steps))


def misaligned(state: torch.Tensor) -> torch.Tensor:
    return torch.cat([state.flatten()[:1], state.flatten()])[1:].view(state.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda step: {"last_hidden_states": misaligned(step.last_hidden_states)},
        lambda step: {"last_hidden_states": step.last_hidden_states.T.contiguous().T},
        lambda step: {"aux_hidden_states": [state.double() for state in step.aux_hidden_states]},
        lambda step: {"token_ids": step.token_ids.to(torch.int16)},
        lambda step: {"positions": step.positions.unsqueeze(1).squeeze(1).to(torch.float64)},
    ],
)
def test_tensors_that_the_kernel_cannot_read_go_torch_s_way_and_are_spoken_of_once(
    change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rng, layout = random.Random(2), RowLayout(24, 3, torch.bfloat16)
    step = step_of(rng, layout, "cpu")
    steps = [replace(step, **change(step))] * 2
    with caplog.at_level(logging.WARNING):
        found = rows_of(layout, KernelFill(layout), steps)
    assert torch.equal(found, rows_of(layout, TorchFill(layout), steps))
    assert caplog.text.count("not as expected") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda step: {"last_hidden_states": step.last_hidden_states[: sum(step.lengths) - 1]},
        lambda step: {"aux_hidden_states": step.aux_hidden_states[1:]},
        lambda step: {"positions": step.positions[:-1]},
        lambda step: {"sampled": step.sampled[:-1]},
        lambda step: {"sampled": step.sampled[:, : max(step.num_drafts)]},
    ],
)
def test_what_is_missing_is_not_read(change: Any) -> None:
    """On a device, reading it would be the end of the process. A fault of torch's costs the step's rows."""
    rng, layout = random.Random(2), RowLayout(24, 3, torch.bfloat16)
    step = step_of(rng, layout, "cpu")
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        rows_of(layout, KernelFill(layout), [replace(step, **change(step))])


class Calls(TorchDispatchMode):
    """Counts torch's operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def test_torch_is_called_for_the_upload_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch is left out: interpreted, it calls torch itself."""
    launches: list[tuple[int, int]] = []

    class Launch:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return lambda *_, **__: launches.append(grid)

    monkeypatch.setattr("aurora_vllm.spec_decode.capture_kernel.capture_kernel", Launch())
    layout = RowLayout(24, 3, torch.bfloat16)
    step = step_of(random.Random(2), layout, "cpu")
    counts = {}
    for fill in (TorchFill(layout), KernelFill(layout)):
        writer, sink = writer_of(layout, fill, "cpu", 0)
        views = [torch.cat(sink.reserve(sum(step.lengths)))]  # the ring does not wrap
        monkeypatch.setattr(sink, "reserve", lambda _, views=views: views)
        with Calls() as calls:
            assert writer.write(step)
        counts[fill.name] = calls.count
    assert launches == [(sum(step.lengths), 4)]
    assert counts["torch"] >= 30 and counts["one kernel"] == 1


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from aurora_vllm.spec_decode.capture_kernel import COMPILED, KernelFill, capture_kernel
from aurora_vllm.transport.rows import RowLayout

assert COMPILED
for hidden in (4096, 4095):
    constants = KernelFill(RowLayout(hidden, 3, torch.bfloat16))._constants
    signature = {"rows_ptr": "*u8", "step_ptr": "*i64", "first": "i32"} | dict.fromkeys(constants, "constexpr")
    for capability in (80, 90, 100):
        made = compile(ASTSource(capture_kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        wide = [made.asm["ptx"].count(f"{op}.global.v4.b32") for op in ("ld", "st")]
        print(hidden, capability, len(made.asm["cubin"]), *wide)
"""


def test_the_kernel_compiles_for_gpus_and_copies_16_bytes_at_a_time() -> None:
    """Ampere, Hopper and Blackwell, with the assembler that Triton brings along; no GPU is needed for that."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    lines = [[int(number) for number in line.split()] for line in found.stdout.splitlines()]
    assert len(lines) == 6 and all(size > 1000 for _, _, size, *_ in lines)
    assert [wide for hidden, _, _, *wide in lines if hidden == 4096] == [[4, 4]] * 3


VARIANTS = """
import random
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from aurora_vllm.spec_decode.capture_kernel import KernelFill, capture_kernel
from aurora_vllm.spec_decode.rehearsal import rehearse
from aurora_vllm.transport.rows import RowLayout
from tests.unit.capture_world import step_of, writer_of

class NoDriver:
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 200_000}
    )
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, _=None: 0

    def launcher_cls(self, *_):
        return lambda *arguments: launches.append(arguments[:2])

launches = []
driver.set_active(NoDriver())
layout, cpu = RowLayout(24, 3, torch.bfloat16), torch.device("cpu")
fill = KernelFill(layout)
rehearse(fill, layout, cpu, cpu)
variants = capture_kernel.device_caches[0][0]
print(len(launches), len(variants))
rng = random.Random(0)
writer, _ = writer_of(layout, fill, "cpu", opted_out=4)
for _ in range(50):
    writer.write(step_of(rng, layout, "cpu"))
print(len(launches), len(variants))
"""


def test_nothing_is_compiled_behind_the_rehearsal() -> None:
    """Triton's own launcher, with a driver that launches nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    (rehearsed, before), (launches, after) = (map(int, line.split()) for line in found.stdout.splitlines())
    assert before == after == 1 and rehearsed == 2 * 6 and launches > rehearsed + 50
