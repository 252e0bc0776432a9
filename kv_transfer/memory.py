"""The memory of a KV pool: anonymous, shareable by file descriptor, gone with its processes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CANARY_SLOT_BYTES = 64
CANARY_SLOTS = 64  # behind the pool, where a new peer proves that it reaches this memory
_TAIL_BYTES = CANARY_SLOT_BYTES * CANARY_SLOTS


class KVMemory(Protocol):
    """A pool's memory, wherever it lies: `PoolMemory` or `device_memory.DeviceMemory`."""

    device: str  # "cpu" | "cuda"
    num_bytes: int
    fd: int  # to pass to a neighbour; -1 where a `handle` is
    handle: bytes

    @property
    def mark(self) -> Callable[[], Any] | None:
        """What makes a step's `LayerClock` marks; None where none are needed."""
        ...

    @property
    def buffer(self) -> Any:
        """The pool as `engine.cache.KVCache` takes it."""
        ...

    def read(self, start: int, num_bytes: int) -> NDArray[np.uint8]:
        """Some of the pool's bytes, in host memory."""
        ...

    def holds_canary(self, slot: int, pattern: bytes) -> bool: ...

    def put_canary(self, slot: int, pattern: bytes) -> None: ...

    def close(self) -> None: ...


class PoolMemory:
    """`num_bytes` of zeroed memory in a memfd, followed by the canary slots.

    A memfd has no name: after `kill -9` nothing is left behind. `buffer` is the pool alone,
    writable; `address` its first byte. `numpy.frombuffer` and `torch.frombuffer` take `buffer`.
    The mapping lives as long as something views it.
    """

    device = "cpu"
    handle = b""
    mark = None

    def __init__(self, num_bytes: int, *, prefault: bool = False) -> None:
        """`prefault` touches every page now, so that the first transfer does not pay for it."""
        fd = os.memfd_create("phasewise-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes + _TAIL_BYTES)
            _seal_size(fd)
        except OSError:
            os.close(fd)
            raise
        self._open(fd, num_bytes, prefault)

    @classmethod
    def attach(cls, fd: int, num_bytes: int) -> PoolMemory:
        """Map a peer's pool from a received descriptor, which is this object's from now on.

        Raises ValueError if the descriptor cannot hold `num_bytes` or can be cut shorter by its
        owner: touching a page past the end would kill this process (SIGBUS).
        """
        if os.fstat(fd).st_size != num_bytes + _TAIL_BYTES or not _size_is_sealed(fd):
            os.close(fd)
            raise ValueError(f"descriptor is not a sealed pool of {num_bytes} bytes")
        memory = cls.__new__(cls)
        try:
            memory._open(fd, num_bytes, False)
        except OSError:  # a mapping holds a descriptor of its own
            os.close(fd)
            raise
        return memory

    def _open(self, fd: int, num_bytes: int, prefault: bool) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if prefault else 0)
        self._map = mmap.mmap(fd, num_bytes + _TAIL_BYTES, flags)
        self._map.madvise(mmap.MADV_DONTFORK)  # a forked child must not be a writer nobody knows
        self._whole = memoryview(self._map)
        self._pool = self._whole[:num_bytes]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def buffer(self) -> memoryview:
        return self._pool

    def read(self, start: int, num_bytes: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.buffer, np.uint8, num_bytes, start)

    def holds_canary(self, slot: int, pattern: bytes) -> bool:
        return self.canary(slot) == pattern

    def put_canary(self, slot: int, pattern: bytes) -> None:
        self.canary(slot)[: len(pattern)] = pattern

    def canary(self, slot: int) -> memoryview:
        """One canary slot, `CANARY_SLOT_BYTES` long."""
        start = self.num_bytes + (slot % CANARY_SLOTS) * CANARY_SLOT_BYTES
        return self._whole[start : start + CANARY_SLOT_BYTES]

    def close(self) -> None:
        """Give the descriptor back. The mapping goes with the last object that views it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unmap(self) -> None:
        """Give a peer's pool back at once: descriptor and mapping. Nothing may view it."""
        self.close()
        self._pool.release()
        self._whole.release()
        self._map.close()


_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SHRINK, _F_SEAL_GROW = 0x0002, 0x0004


def _seal_size(fd: int) -> None:
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)


def _size_is_sealed(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK)
    except OSError:
        return False


def memory_on(device: str, num_bytes: int) -> KVMemory:
    """A new pool on `device`, "cpu" or "cuda". Raises InvalidConfig, OSError."""
    if device != "cuda":
        return PoolMemory(num_bytes)
    from .device_memory import DeviceMemory

    return DeviceMemory(num_bytes)
