"""Versions staged beside a running model. Written without a GPU: see docs/gpu.md."""

from __future__ import annotations

import threading
import time
import zlib

import pytest
import torch

from aurora_vllm.spec_decode import swap
from aurora_vllm.spec_decode.stager import Stager
from aurora_vllm.spec_decode.swap import LiveDraft
from aurora_vllm.transport.bank import TensorSpec
from aurora_vllm.transport.control import ControlBlock, control_bytes
from aurora_vllm.transport.cuda import CudaMemory
from aurora_vllm.transport.segment import Segment
from benchmarks import gpu_processes as processes
from tests.unit.test_swap_on_accelerator import VOCABULARY, contents, make_draft, version

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda:0"


def test_a_checksum_is_of_the_bytes_there() -> None:
    memory = CudaMemory.create("summed", 4 << 20, torch.device(DEVICE))
    memory.bytes.random_()
    wanted = zlib.crc32(bytes(memory.bytes.tolist()))
    assert memory.crc32(1 << 20, 4 << 20, memory.crc32(0, 1 << 20, 0)) == wanted
    assert memory._on_host.is_pinned()
    memory.release()


def test_a_thread_of_its_own_can_make_and_sum_memory() -> None:
    sums: list[int] = []

    def work() -> None:
        memory = CudaMemory.create("of_a_thread", 2 << 20, torch.device(DEVICE))
        memory.bytes.zero_()
        sums.append(memory.crc32(0, 1 << 20, 0))
        memory.release()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert sums == [zlib.crc32(bytes(1 << 20))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_found_in_one_pass(dtype: torch.dtype) -> None:
    weight = torch.ones((2048, 1024), dtype=dtype, device=DEVICE)
    assert swap._is_finite(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert swap._is_finite(weight)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 8  # no copy, no mask
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (2047, 1023), (1000, 77)):
            spoilt = weight.clone()
            spoilt[place] = bad
            assert not swap._is_finite(spoilt)


def test_a_version_takes_what_the_rehearsal_freed() -> None:
    with torch.device(DEVICE):
        draft = make_draft()
    tensors = {name: tensor.to(DEVICE) for name, tensor in version(2).items()}  # drawn on the host
    draft.draft_id_to_target_id.data.copy_(torch.arange(len(draft.draft_id_to_target_id)))
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    bank, names = processes.make_bank(DEVICE, specs)
    with Segment.create("control", control_bytes()) as block:
        control = ControlBlock.create(block)
        control.worker.live_version = 1
        stager = Stager(bank, LiveDraft(draft, target=None), control, torch.device(DEVICE))
        bank.publish(2, tensors, {})
        before = torch.cuda.memory_reserved()
        deadline = time.monotonic() + 20
        while control.worker.staged_version != 2:
            assert time.monotonic() < deadline, control.worker.refusal
            time.sleep(0.01)
        assert torch.cuda.memory_reserved() == before
        torch.cuda.set_sync_debug_mode("error")
        try:
            stager.commit_if_ready()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stager.close()
        assert control.worker.live_version == 2 and control.worker.swaps == 1
    live, wanted = contents(draft), version(2)
    assert torch.equal(live["fc"].cpu(), wanted["fc.weight"]) and torch.equal(live["d2t"].cpu(), wanted["d2t"])
    assert torch.equal(live["lm_head"][:VOCABULARY].cpu(), wanted["lm_head.weight"])
    processes.remove(names)
