"""cuda_driver.py's calls, argument for argument, against a stand-in of the driver (stand_in_cuda.c) in two processes.

It says that what is passed is what the driver's documentation asks for; it says nothing of a GPU.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aurora_vllm.transport import cuda_driver
from aurora_vllm.transport.cuda_driver import HANDLE_BYTES, NoDeviceMemory

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
READER = """
import ctypes, sys
from aurora_vllm.transport import cuda_driver
cuda_driver.use_primary_context(1)
address = cuda_driver.open_handle(bytes.fromhex(sys.argv[1])) + int(sys.argv[2])
assert cuda_driver.open_handle(bytes.fromhex(sys.argv[1])) + int(sys.argv[2]) == address  # mapped once
print(ctypes.string_at(address, 5).decode())
ctypes.memmove(address, b"heard", 5)
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of a libcuda.so.1 that is the stand-in; in use here."""
    library = tmp_path / "libcuda.so.1"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", library, HERE / "stand_in_cuda.c", "-lrt"], check=True)
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: real(str(library) if name == library.name else name))
    caches = (cuda_driver._driver, cuda_driver.open_handle)
    for cache in caches:
        cache.cache_clear()
    cuda_driver.use_primary_context(0)
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def heard(driver: Path, handle: bytes, offset: int) -> str:
    """What another process finds there."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-c", READER, handle.hex(), str(offset)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def in_a_new_thread(work: Callable[[], object]) -> None:
    """Threads have contexts of their own. Raises what the work raises."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        raise error


def test_what_one_process_allocates_another_opens(driver: Path) -> None:
    address, handle = cuda_driver.allocate(1 << 20)
    try:
        assert len(handle) == HANDLE_BYTES
        ctypes.memmove(address, b"hello", 5)
        assert heard(driver, handle, 0) == "hello"
        assert ctypes.string_at(address, 5) == b"heard"
    finally:
        cuda_driver.free(address)


def test_what_lies_inside_an_allocation_is_lent_by_its_place(driver: Path) -> None:
    address, whole = cuda_driver.allocate(1 << 20)
    try:
        ctypes.memmove(address + 4097, b"there", 5)
        handle, offset = cuda_driver.export(address + 4097)
        assert (handle, offset) == (whole, 4097)
        assert heard(driver, handle, offset) == "there"
    finally:
        cuda_driver.free(address)


@pytest.mark.usefixtures("driver")
def test_what_the_driver_refuses_is_said_in_its_words() -> None:
    with pytest.raises(NoDeviceMemory, match=r"cannot allocate .* MiB on the GPU: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        cuda_driver.allocate(1 << 50)
    with pytest.raises(NoDeviceMemory, match=r"no memory of the GPU: CUDA_ERROR_INVALID_VALUE \(1\)"):
        cuda_driver.export(ctypes.addressof(ctypes.create_string_buffer(8)))
    with pytest.raises(NoDeviceMemory, match=r"cannot allocate .*: CUDA_ERROR_INVALID_CONTEXT \(201\)"):
        in_a_new_thread(lambda: cuda_driver.allocate(4096))
    with pytest.raises(NoDeviceMemory, match=r"no GPU 2: CUDA_ERROR_INVALID_DEVICE \(101\)"):
        in_a_new_thread(lambda: cuda_driver.use_primary_context(2))
    address, handle = cuda_driver.allocate(4096)
    cuda_driver.free(address)
    with pytest.raises(NoDeviceMemory, match=r"cannot open memory of the GPU: CUDA_ERROR_MAP_FAILED \(205\)"):
        cuda_driver.open_handle(handle)


@pytest.mark.usefixtures("driver")
def test_a_thread_without_a_context_takes_the_primary_one_and_keeps_another() -> None:
    library, devices = cuda_driver._driver(), []

    def work() -> None:
        for index in (1, 0):
            cuda_driver.use_primary_context(index)
            devices.append(library.stand_in_device())
        cuda_driver.free(cuda_driver.allocate(4096)[0])

    before = library.stand_in_retained()
    in_a_new_thread(work)
    assert devices == [1, 1] and library.stand_in_device() == 0
    assert library.stand_in_retained() == before + 1


@pytest.mark.usefixtures("driver")
def test_memory_that_is_not_freed_is_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    address, _ = cuda_driver.allocate(4096)
    cuda_driver.free(address)
    assert not caplog.messages
    cuda_driver.free(address)
    assert caplog.messages == ["aurora: memory of the GPU stays taken: CUDA_ERROR_INVALID_VALUE (1)"]
