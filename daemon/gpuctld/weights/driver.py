"""The few calls of the CUDA driver that torch does not offer, with errors as exceptions.

Virtual memory management (CUDA driver API, section 6.14) separates an address range from the
memory behind it, which is what keeps a slab's address while its memory comes and goes. Addresses
and sizes are plain integers, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda

from gpuctl.errors import GpuctlError, OutOfMemory

_DEVICE = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
_POSIX_FD = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_PINNED = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
_READ_WRITE = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
_OUT_OF_MEMORY = cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_PORTABLE = cuda.CU_MEMHOSTREGISTER_PORTABLE


class DriverError(GpuctlError):
    """A driver call failed; the message is CUDA's name and description of the error."""


def _call(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error == _OUT_OF_MEMORY:
        raise OutOfMemory("CUDA out of memory", "unload another model, or see who holds the GPU")
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise DriverError(f"CUDA error: {_describe(error)}")
    return values[0] if values else None


def _describe(error: Any) -> str:
    _, text = cuda.cuGetErrorString(error)
    return f"{text.decode() if text else 'unknown error'} ({error.name})"


def _properties(device: int) -> Any:
    properties = cuda.CUmemAllocationProp()
    properties.type = _PINNED
    properties.location.type = _DEVICE
    properties.location.id = device
    properties.requestedHandleTypes = _POSIX_FD
    return properties


def granularity(device: int) -> int:
    """What sizes and addresses of device memory must be a multiple of; 2 MiB so far."""
    return int(_call(cuda.cuMemGetAllocationGranularity(_properties(device), _MINIMUM)))


def reserve(size: int) -> int:
    """An address range without memory."""
    return int(_call(cuda.cuMemAddressReserve(size, 0, 0, 0)))


def free_addresses(address: int, size: int) -> None:
    """Give a reserved range back; nothing may be mapped in it."""
    _call(cuda.cuMemAddressFree(address, size))


def create(size: int, device: int) -> Any:
    """Device memory without an address, which other processes can be given.

    Raises:
        OutOfMemory: the device has not enough.
    """
    return _call(cuda.cuMemCreate(size, _properties(device), 0))


def map_at(address: int, size: int, handle: Any, device: int) -> None:
    """Put memory behind addresses, and let ``device`` use it.

    Raises:
        DriverError: for one, ``device`` has no peer access to another GPU's memory.
    """
    _call(cuda.cuMemMap(address, size, 0, handle, 0))
    access = cuda.CUmemAccessDesc()
    access.location.type = _DEVICE
    access.location.id = device
    access.flags = _READ_WRITE
    try:
        _call(cuda.cuMemSetAccess(address, size, [access], 1))
    except GpuctlError:
        unmap(address, size)
        raise


def unmap(address: int, size: int) -> None:
    """Take the memory from behind addresses; whole mappings only."""
    _call(cuda.cuMemUnmap(address, size))


def release(handle: Any) -> None:
    """Give memory back, once nothing maps it any more."""
    _call(cuda.cuMemRelease(handle))


def export(handle: Any) -> int:
    """A file descriptor that another process can import the memory from."""
    return int(_call(cuda.cuMemExportToShareableHandle(handle, _POSIX_FD, 0)))


def import_memory(descriptor: int) -> Any:
    """A handle of memory that another process has exported; the descriptor stays open."""
    return _call(cuda.cuMemImportFromShareableHandle(descriptor, _POSIX_FD))


def copy_async(target: int, source: int, size: int, stream: int) -> None:
    """Copy in the order of ``stream``; does not wait, unless ``source`` is pageable memory."""
    _call(cuda.cuMemcpyAsync(target, source, size, stream))


def register_host(address: int, size: int) -> None:
    """Pin host memory, so that the GPU reads it at the full rate of the link.

    Raises:
        DriverError: for one, a limit on locked memory.
    """
    _call(cuda.cuMemHostRegister(address, size, _PORTABLE))


def unregister_host(address: int) -> None:
    """Undo :func:`register_host`; named by the first address."""
    _call(cuda.cuMemHostUnregister(address))


def lock_process(pid: int, timeout_ms: int) -> None:
    """Have a process's CUDA calls wait, once those under way are done.

    Raises:
        DriverError: not within ``timeout_ms``, or the driver is older than 570.
    """
    arguments = cuda.CUcheckpointLockArgs()
    arguments.timeoutMs = timeout_ms
    _checkpoint(cuda.cuCheckpointProcessLock, pid, arguments)


def checkpoint_process(pid: int) -> None:
    """Move everything that a locked process has on its GPUs to host memory."""
    _checkpoint(cuda.cuCheckpointProcessCheckpoint, pid, cuda.CUcheckpointCheckpointArgs())


def restore_process(pid: int) -> None:
    """Move it back.

    Raises:
        OutOfMemory: the device has not enough; nothing has changed.
    """
    _checkpoint(cuda.cuCheckpointProcessRestore, pid, cuda.CUcheckpointRestoreArgs())


def unlock_process(pid: int) -> None:
    """Undo :func:`lock_process`."""
    _checkpoint(cuda.cuCheckpointProcessUnlock, pid, cuda.CUcheckpointUnlockArgs())


def _checkpoint(call: Callable[[int, Any], tuple[Any, ...]], pid: int, arguments: Any) -> None:
    try:
        _call(call(pid, arguments))
    except RuntimeError as missing:  # the bindings know the call and the driver does not
        raise DriverError(f"the driver is too old: {missing}") from None


def current_context() -> Any:
    """The calling thread's context."""
    return _call(cuda.cuCtxGetCurrent())


def use_context(context: Any) -> None:
    """Make a context current in the calling thread."""
    _call(cuda.cuCtxSetCurrent(context))
