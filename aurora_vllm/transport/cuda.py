"""Memory on a GPU that two processes share by CUDA IPC. WRITTEN AND NEVER RUN: see docs/gpu.md.

One allocation of the driver (``cuMemAlloc``, which is what cudaMalloc calls), exported by ``cuIpcGetMemHandle``. Of
three ways to it:

- torch.multiprocessing's reductions share blocks of torch's caching allocator. Each hand-over counts a reference that
  a killed process never gives back, and what is shared depends on how the allocator is set up (``expandable_segments``,
  vLLM's sleep mode). These allocations never pass through it, so that setting need not be refused.
- cuda-python is one more dependency, whose version must fit the driver's.
- ctypes on ``libcuda.so.1`` needs ten functions of a stable interface, and its name has no version of CUDA in it.

A page of POSIX shared memory describes the allocation, so it is opened by name, as a segment is. It belongs to the
process that made it, and it alone may :meth:`CudaMemory.hand_over`: that is meant to be the worker, without which there
is nothing to share. A learner that dies and comes back opens it again; where the worker died, it is gone.

Ordering. The producer's copies are enqueued on its current stream, and behind them an inter-process event is recorded;
then the host stores the counter. The consumer sees the counter, and makes its stream wait for the event as it was
recorded last, which is that commit's or a later one's. Nobody's host waits for that. What a consumer gives back, and
what a learner publishes, it has waited for (:meth:`CudaMemory.settle`), so the serving side never waits for an event of
the learner's: a dead learner leaves none behind.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import ClassVar

import torch

from aurora_vllm.transport import cuda_driver
from aurora_vllm.transport.cuda_description import Description
from aurora_vllm.transport.cuda_driver import NoDeviceMemory as NoDeviceMemory
from aurora_vllm.transport.fence import fence
from aurora_vllm.transport.segment import Segment, owner_is_alive
from aurora_vllm.transport.waits import OwnerGone, blaming, wait_for_this_stream, wait_until

GRANULE = 2 << 20  # bytes; smaller allocations share such a block, and a handle would export their neighbours


class CudaMemory:
    """A :class:`.memory.Memory` on a GPU. Use :meth:`create`, :meth:`lend` or :meth:`open`.

    It stays mapped until the process ends: tensors over unmapped memory would crash it.
    """

    # What this process made and did not release, whoever else has forgotten it: others open it by its name at any time,
    # and then wait for its event, which torch destroys with its last reference.
    _made: ClassVar[dict[str, CudaMemory]] = {}

    def __init__(
        self,
        segment: Segment,
        device: torch.device,
        pointer: int,
        size: int,
        event: torch.cuda.Event,
        owned: bool,
        lent: torch.Tensor | None = None,
    ) -> None:
        self.name = segment.name
        self.device = device
        self.bytes = tensor_over(pointer, size, device)
        self._segment = segment
        self._event = event
        self._owned = owned
        self._lent = lent  # whose memory it is: it is not freed while others read it
        self._stream: torch.cuda.Stream | None = None  # the one last handed over from
        self._on_host = torch.empty(0, dtype=torch.uint8)  # where crc32 reads; from its first call on
        if owned:
            self._made[self.name] = self

    @classmethod
    def create(cls, kind: str, size: int, device: torch.device) -> CudaMemory:
        """Allocate at least `size` bytes on a device, not zeroed; `kind` ends the name of the page that describes it.

        Raises:
            NoDeviceMemory: there is no CUDA device, or no room on it.
        """
        device = _make_current(device)
        size = -(-size // GRANULE) * GRANULE
        with torch.cuda.device(device):
            pointer, handle = cuda_driver.allocate(size)
            try:
                return cls._describe(kind, device, pointer, size, handle)
            except BaseException:
                cuda_driver.free(pointer)
                raise

    @classmethod
    def lend(cls, kind: str, tensor: torch.Tensor) -> CudaMemory:
        """Share what a tensor of this process holds, where it lies. Others map all of the allocation it is a part of.

        Args:
            kind: as for :meth:`create`.
            tensor: contiguous; it must stay where it is as long as this process lives.

        Raises:
            NoDeviceMemory: there is no CUDA device, or this tensor's memory cannot be shared.
        """
        device = _make_current(tensor.device)
        with torch.cuda.device(device):
            handle, offset = cuda_driver.export(tensor.data_ptr())
            return cls._describe(kind, device, tensor.data_ptr(), tensor.nbytes, handle, offset, tensor)

    @classmethod
    def _describe(
        cls,
        kind: str,
        device: torch.device,
        pointer: int,
        size: int,
        handle: bytes,
        offset: int = 0,
        lent: torch.Tensor | None = None,
    ) -> CudaMemory:
        """The owner's side, with the page that others open it by."""
        event = torch.cuda.Event(interprocess=True)
        event_handle = event.ipc_handle()
        segment = Segment.create(kind, 4096)
        Description(size, offset, _uuid(device), handle, event_handle).write(segment)
        return cls(segment, device, pointer, size, event, owned=True, lent=lent)

    @classmethod
    def open(cls, name: str) -> CudaMemory:
        """Map what another living process made.

        Raises:
            NoDeviceMemory: its GPU is not visible here, or the driver refuses.
            OwnerGone: that process is dead.
            FileNotFoundError, PermissionError, ValueError: as Segment.attach; or it describes no device memory.
        """
        segment = Segment.attach(name)
        description = Description.read(segment)
        if not owner_is_alive(name):
            raise OwnerGone(f"device memory {name}: its process is dead")
        device = _make_current(_device_of(description.device))
        with torch.cuda.device(device):
            pointer = cuda_driver.open_handle(description.memory_handle) + description.offset
            event = torch.cuda.Event.from_ipc_handle(device, description.event_handle)
        return cls(segment, device, pointer, description.size, event, owned=False)

    def hand_over(self) -> None:
        """As :meth:`.memory.Memory.hand_over`: records the event on the current stream.

        Raises:
            ValueError: this process did not make the memory.
        """
        if not self._owned:
            raise ValueError("only the process that made device memory hands it over: it alone may record the event")
        stream = torch.cuda.current_stream(self.device)
        if self._stream is None or stream != self._stream:  # to torch no stream differs from None
            self._event.wait(stream)  # the one event stands for what was done on every stream so far
            self._stream = stream
        self._event.record(stream)
        fence()

    def take_over(self) -> None:
        """As :meth:`.memory.Memory.take_over`: the current stream waits for the event.

        Raises:
            OwnerGone: the owner died, and the driver refuses.
        """
        fence()
        with blaming(self._owner_lives):
            self._event.wait(torch.cuda.current_stream(self.device))

    def settle(self) -> None:
        """As :meth:`.memory.Memory.settle`, for this thread's current stream.

        Polls, so that a stream that waits for a dead process does not take this one along.

        Raises:
            OwnerGone: the owner died, and the work has failed or is not done after GRACE_S.
        """
        with blaming(self._owner_lives):
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
            wait_until(done.query, self._owner_lives)
        fence()

    @torch.inference_mode()  # in which alone the buffer may be written to where it was made in it
    def crc32(self, start: int, stop: int, crc: int) -> int:
        """As :meth:`.memory.Memory.crc32`, through a copy on the host: a version has one checksum wherever it lies.

        The copy goes to one page-locked buffer, which stays: a fresh one of plain memory takes the GIL to be zeroed and
        the driver's lock for as long as the copy takes, a hundred times a version, beside the thread that drives the
        engine. One thread at a time.
        """
        size = stop - start
        if len(self._on_host) < size:
            self._on_host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._on_host[:size].copy_(self.bytes[start:stop], non_blocking=True)
        wait_for_this_stream(self.device)
        return zlib.crc32((ctypes.c_ubyte * size).from_address(self._on_host.data_ptr()), crc)

    def unlink(self) -> None:
        """Take the name away; idempotent. Who has it open keeps the memory."""
        self._segment.unlink()

    def release(self) -> None:
        """As :meth:`.memory.NamedMemory.release`."""
        self.unlink()
        self._made.pop(self.name, None)
        pointer, self.bytes = self.bytes.data_ptr(), torch.empty(0, dtype=torch.uint8)
        if self._lent is None:
            with torch.cuda.device(self.device):
                cuda_driver.free(pointer)

    def _owner_lives(self) -> bool:
        return self._owned or owner_is_alive(self.name)


def tensor_over(pointer: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] over memory that is somebody else's to free.

    By the function that torch's own CUDA graph trees use; ``__cuda_array_interface__`` would need numpy.
    """
    storage = torch._C._construct_storage_from_data_pointer(pointer, device, size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _make_current(device: torch.device) -> torch.device:
    """See that the driver's calls in this thread find torch's context of the device. Returns it with its index."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise NoDeviceMemory("no CUDA device here")
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    cuda_driver.use_primary_context(index)
    return torch.device("cuda", index)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _device_of(uuid: str) -> torch.device:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if _uuid(torch.device("cuda", index)) == uuid:
            return torch.device("cuda", index)
    raise NoDeviceMemory(f"the GPU {uuid} is not visible in this process; see CUDA_VISIBLE_DEVICES")
