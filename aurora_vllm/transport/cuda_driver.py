"""Calls of the CUDA driver that torch does not offer, by ctypes. RUN AGAINST A STAND-IN ONLY: see docs/gpu.md."""

from __future__ import annotations

import ctypes
import functools
import logging

logger = logging.getLogger("vllm.aurora")

HANDLE_BYTES = 64  # of CUipcMemHandle and cudaIpcEventHandle_t


class NoDeviceMemory(RuntimeError):
    """No such memory can be made or opened here. One line, fit to be shown to a user."""


class _MemHandle(ctypes.Structure):
    """CUipcMemHandle, passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoDeviceMemory(f"no CUDA driver here: {error}") from None
    pointer = ctypes.POINTER(ctypes.c_ulonglong)  # CUdeviceptr
    library.cuMemAlloc_v2.argtypes = [pointer, ctypes.c_size_t]
    library.cuMemFree_v2.argtypes = [ctypes.c_ulonglong]
    size = ctypes.POINTER(ctypes.c_size_t)
    library.cuMemGetAddressRange_v2.argtypes = [pointer, size, ctypes.c_ulonglong]
    library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_MemHandle), ctypes.c_ulonglong]
    library.cuIpcOpenMemHandle_v2.argtypes = [pointer, _MemHandle, ctypes.c_uint]
    context = ctypes.POINTER(ctypes.c_void_p)  # CUcontext
    library.cuCtxGetCurrent.argtypes = [context]
    library.cuDeviceGet.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    library.cuDevicePrimaryCtxRetain.argtypes = [context, ctypes.c_int]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise NoDeviceMemory(f"{what}: {(name.value or b'an unknown error').decode()} ({result})")


def use_primary_context(index: int) -> None:
    """Where this thread has no context, make it the device's primary one, which torch's calls use: the calls here take
    what is current, and whether torch has made it so depends on its version and on what the thread did before.

    Raises:
        NoDeviceMemory: there is no driver, or it has no such device.
    """
    driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "no context of the GPU")
    if context.value is None:
        _check(driver.cuDeviceGet(ctypes.byref(device), index), f"no GPU {index}")
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "no context of the GPU")
        _check(driver.cuCtxSetCurrent(context), "no context of the GPU")


def allocate(size: int) -> tuple[int, bytes]:
    """Address and IPC handle of a new allocation of ``size`` bytes in the current context.

    Raises:
        NoDeviceMemory: there is no driver, no room, or such memory cannot be shared here.
    """
    driver, address, handle = _driver(), ctypes.c_ulonglong(), _MemHandle()
    _check(driver.cuMemAlloc_v2(ctypes.byref(address), size), f"cannot allocate {size / 2**20:.1f} MiB on the GPU")
    try:
        _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), address), "cannot share memory of the GPU")
    except NoDeviceMemory:
        free(address.value)
        raise
    return address.value, bytes(handle.reserved)


def export(address: int) -> tuple[bytes, int]:
    """IPC handle of the allocation that an address of this process lies in, whoever made it, and how far in it lies.

    Raises:
        NoDeviceMemory: the allocation was not made by cuMemAlloc (torch's ``expandable_segments``, vLLM's sleep mode).
    """
    driver, base, size, handle = _driver(), ctypes.c_ulonglong(), ctypes.c_size_t(), _MemHandle()
    _check(driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address), "no memory of the GPU")
    _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), base), "cannot share memory of the GPU")
    return bytes(handle.reserved), address - base.value


@functools.cache  # one mapping of an allocation in a process, however many tensors of it were lent
def open_handle(handle: bytes) -> int:
    """Address in this process of another process's allocation. It stays mapped."""
    address, lazy_peer_access = ctypes.c_ulonglong(), 1
    given = _MemHandle.from_buffer_copy(handle)
    _check(
        _driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), given, lazy_peer_access), "cannot open memory of the GPU"
    )
    return address.value


def free(address: int) -> None:
    """Give an allocation of this process back. Never raises: who frees has mostly another error to tell, and at its end
    the process gives everything back."""
    try:
        _check(_driver().cuMemFree_v2(address), "memory of the GPU stays taken")
    except NoDeviceMemory as error:
        logger.warning("aurora: %s", error)
