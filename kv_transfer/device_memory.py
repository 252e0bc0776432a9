"""The memory of a KV pool on a GPU: one allocation that another process may map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..engine.errors import InvalidConfig
from .memory import CANARY_SLOT_BYTES, CANARY_SLOTS

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess: reach a neighbouring GPU's memory


class DeviceError(OSError):
    """CUDA refused; for a peer's memory this means: not reachable that way."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """How this process reaches its GPU."""

    runtime: Any  # cuda-bindings' module
    device: str  # as torch names it
    copy: Callable[..., None]  # `kernels.cuda.transfer.copy_blocks`
    gather: Callable[..., None]  # `gather_blocks` there
    scatter: Callable[..., None]  # `scatter_blocks` there


class DeviceMemory:
    """What `PoolMemory` is, on the current CUDA device: `num_bytes` of zeroed blocks with the
    canary slots behind them, in one cudaMalloc of their own.

    Torch's allocator would do neither: its expandable segments cannot be exported, and a block
    shared by its own means leaks when the other process is killed.
    """

    device = "cuda"
    fd = -1  # nothing to pass over a unix socket: `handle` goes in the hello

    def __init__(self, num_bytes: int, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or this_gpu()
        self._runtime = self.gpu.runtime
        self.num_bytes = num_bytes
        size = num_bytes + CANARY_SLOTS * CANARY_SLOT_BYTES
        self.address = int(checked(self._runtime.cudaMalloc(size), "cudaMalloc"))
        checked(self._runtime.cudaMemset(self.address, 0, size), "cudaMemset")
        exported = checked(self._runtime.cudaIpcGetMemHandle(self.address), "cudaIpcGetMemHandle")
        self.handle = bytes(exported.reserved)

    @property
    def buffer(self) -> torch.Tensor:  # uint8 [num_bytes]
        """The pool as a tensor that views it. The memory must outlive it."""
        return torch.as_tensor(_Span(self.address, self.num_bytes), device=self.gpu.device)

    def mark(self) -> torch.cuda.Event:
        """Completes with what this thread has put on its stream so far."""
        event = torch.cuda.Event(blocking=True)
        event.record()
        return event

    def read(self, start: int, num_bytes: int) -> NDArray[np.uint8]:
        """A copy of some bytes of the pool. Waits for the device."""
        copy = np.empty(num_bytes, np.uint8)
        self._copy(copy.ctypes.data, self.address + start, num_bytes)
        return copy

    def holds_canary(self, slot: int, pattern: bytes) -> bool:
        return self.read(_canary_offset(self.num_bytes, slot), len(pattern)).tobytes() == pattern

    def put_canary(self, slot: int, pattern: bytes) -> None:
        source = np.frombuffer(pattern, np.uint8)
        target = self.address + _canary_offset(self.num_bytes, slot)
        self._copy(target, source.ctypes.data, len(pattern))

    def close(self) -> None:
        """Give the memory back; nothing may view it. It stays until peers have unmapped it."""
        if self.address:
            self._runtime.cudaFree(self.address)
            self.address = 0

    def _copy(self, target: int, source: int, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        checked(self._runtime.cudaMemcpy(target, source, size, kind), "cudaMemcpy")


class PeerDeviceMemory(DeviceMemory):
    """A peer's pool, mapped: `address` is ours for it. Raises DeviceError where it cannot be."""

    def __init__(self, handle: bytes, num_bytes: int, gpu: Gpu) -> None:
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"a handle of {len(handle)} bytes")
        self.gpu, self._runtime = gpu, gpu.runtime
        self.num_bytes, self.handle = num_bytes, handle
        packed = self._runtime.cudaIpcMemHandle_t()
        packed.reserved = handle
        opened = self._runtime.cudaIpcOpenMemHandle(packed, _LAZY_PEER_ACCESS)
        self.address = int(checked(opened, "cudaIpcOpenMemHandle"))

    def unmap(self) -> None:
        """Let go of it: a dead owner's memory stays pinned until then."""
        self.close()

    def close(self) -> None:
        if self.address:
            self._runtime.cudaIpcCloseMemHandle(self.address)
            self.address = 0


def this_gpu() -> Gpu:
    """The current CUDA device. cuda-bindings come with recent builds of torch for CUDA."""
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InvalidConfig(
            "device", "cuda workers need cuda-bindings", "pip install cuda-bindings"
        ) from error
    from ..kernels.cuda import transfer

    return Gpu(
        runtime, "cuda", transfer.copy_blocks, transfer.gather_blocks, transfer.scatter_blocks
    )


def checked(result: Any, what: str) -> Any:
    """The value of a CUDA call that answered `(error, value...)`. Raises DeviceError."""
    error, *values = result
    if int(error):
        raise DeviceError(f"{what} failed: {getattr(error, 'name', error)}")
    return values[0] if values else None


class _Span:
    """Device bytes, as torch takes them without owning them."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _canary_offset(num_bytes: int, slot: int) -> int:
    return num_bytes + slot % CANARY_SLOTS * CANARY_SLOT_BYTES
