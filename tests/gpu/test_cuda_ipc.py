"""The ring and the bank between two processes over CUDA IPC. Written without a GPU: see docs/gpu.md."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from aurora_vllm.spec_decode.exchange import AcceleratorExchange, Standing
from aurora_vllm.transport.bank import TensorSpec, WeightBank, bank_bytes
from aurora_vllm.transport.control import ControlBlock, WorkerBlock, control_bytes
from aurora_vllm.transport.cuda import CudaMemory
from aurora_vllm.transport.placement import HeadTensors, lend_target_head, place
from aurora_vllm.transport.ring import RingProducer, ring_bytes
from aurora_vllm.transport.segment import Segment
from benchmarks import gpu_capture, gpu_ring, gpu_timing
from benchmarks import gpu_processes as processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda:0"


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_every_row_arrives_whole() -> None:
    """The producer runs under set_sync_debug_mode("error") and would end at a synchronisation."""
    found = gpu_ring.ring_integrity(DEVICE, records=20_000, row_bytes=8256, capacity=512, batch=33)
    assert (found["rows"], found["wrong_rows"]) == (20_000, 0)


def test_capture_and_commit_never_synchronise(no_synchronisation: None) -> None:
    producer, names = processes.make_ring(DEVICE, 8256, 64)
    for _ in range(4):
        assert processes.write_rows(producer, 16)
    assert not processes.write_rows(producer, 1)
    processes.remove(names)


def test_the_host_does_not_wait_in_capture() -> None:
    found = gpu_capture.capture_waits(DEVICE, 512)
    assert not found["host_waits"] and found["rows_written"] == 511 * 4 + (1 + 510 * 4) + (1 + 509 * 4)


def test_a_wait_would_be_seen() -> None:
    there = torch.ones(4, device=DEVICE).add_(1)  # a kernel's first launch waits by itself
    assert gpu_timing.host_waits(DEVICE, lambda: there.sum().item())
    assert not gpu_timing.host_waits(DEVICE, lambda: there.add_(1))


def test_a_published_version_goes_live_without_synchronising() -> None:
    specs = [TensorSpec("a", (64, 32), torch.bfloat16), TensorSpec("b", (7,), torch.bfloat16)]
    bank, names = processes.make_bank(DEVICE, specs)
    process, pipe = processes.start(processes.publish, names, [1])
    processes.receive(pipe)
    process.join()
    publication = bank.read(1)
    live = [torch.zeros(spec.shape, dtype=spec.dtype, device=DEVICE) for spec in specs]
    exchange = AcceleratorExchange(
        live, list(publication.tensors.values()), Standing([tensor.clone() for tensor in live])
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        exchange()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = processes.weights(specs, 1, torch.device(DEVICE))
    assert all(torch.equal(tensor, wanted[spec.name]) for tensor, spec in zip(live, specs, strict=True))
    processes.remove(names)


def test_what_a_worker_places_and_lends_another_process_reads() -> None:
    """The product's own way at start: place, lend_target_head, and join on the other side."""
    specs = [TensorSpec("a", (64, 32), torch.bfloat16)]
    with (
        Segment.create("ring", ring_bytes(8256, 256)) as ring,
        Segment.create("bank", bank_bytes(specs)) as bank,
        Segment.create("control", control_bytes()) as block,
    ):
        RingProducer.create(ring, 8256, 256)
        WeightBank.create(bank, specs)
        worker = ControlBlock.create(block).worker
        producer, _weights = place(ring, bank, torch.device(DEVICE), worker, wanted=True)
        assert worker.memory_device == DEVICE
        embedding, lm_head = (torch.full((1000, 64), n, dtype=torch.bfloat16, device=DEVICE) for n in (2.0, 3.0))
        lend_target_head(lambda: HeadTensors(embedding, lm_head), worker)
        gc.collect()
        learner, pipe = processes.start(processes.join_and_read, (ring.name, bank.name, block.name))
        assert processes.receive(pipe) == (DEVICE, ["a"], [2.0, 3.0])
        assert processes.write_rows(producer, 9)
        assert processes.receive(pipe) == (9, 0)
        learner.join()
        memory = [getattr(worker, name) for name in WorkerBlock.fields if name.endswith("_memory")]
        processes.remove((memory[0], memory[1]))
        processes.remove((memory[2], memory[3]))


def test_a_learner_is_refused_more_than_its_bound() -> None:
    process, pipe = processes.start(processes.allocate_beyond, DEVICE, 64 << 20)
    assert processes.receive(pipe) == "OutOfMemoryError"
    process.join()


def test_tensors_of_torchs_allocator_are_read_by_another_process() -> None:
    """Small ones share an allocation, which a process maps once; a large one has its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in (1000, 3, 30 << 20)]
    on_device = [tensor.to(DEVICE) for tensor in tensors]
    names = [CudaMemory.lend(f"lent_{i}", tensor).name for i, tensor in enumerate(on_device)]
    torch.cuda.synchronize()
    gc.collect()  # nobody here holds what was lent
    process, pipe = processes.start(processes.read_lent, names)
    assert processes.receive(pipe) == [tensor.tolist() for tensor in tensors]
    process.join()
    for name in names:
        CudaMemory._made[name].release()
    assert torch.equal(on_device[0].cpu(), tensors[0])  # still torch's


@pytest.mark.parametrize("direction", ["forward", "reverse+next-token"])
def test_a_training_step_is_the_one_of_the_cpu(direction: str) -> None:
    pytest.importorskip("pydantic")
    from tests.unit.test_learner_on_device import steps_on

    on_cpu = steps_on(torch.device("cpu"), direction)
    assert steps_on(torch.device(DEVICE), direction) == pytest.approx(on_cpu, rel=1e-3)


def test_kill_of_either_side() -> None:
    assert all(gpu_ring.kill_recovery(DEVICE, 8256, 64).values())
