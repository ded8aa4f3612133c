"""What the learner may take of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from aurora_vllm.learner import gpu_bound
from aurora_vllm.learner.gpu_bound import SPARE, bound_gpu_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("planned", "device", "fraction"),
    [(20 * GIB, "cuda:1", SPARE * 0.25), (79 * GIB, "cuda:1", 1.0), (0, "cuda:1", None), (20 * GIB, "cpu", None)],
)
def test_a_tenth_more_than_planned(
    planned: int, device: str, fraction: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, torch.device]] = []
    cuda = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * GIB),
        set_per_process_memory_fraction=lambda *given: told.append(given),
    )
    monkeypatch.setattr(gpu_bound.torch, "cuda", cuda)
    bound_gpu_memory(planned, torch.device(device))
    assert told == ([] if fraction is None else [(pytest.approx(fraction), torch.device(device))])
