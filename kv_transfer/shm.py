"""Shared memory: the writer maps the receiver's pool and copies each run once, unstaged."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from ctypes import memmove

from ..engine.layout import KVLayout
from .copier import WRITE_BYTES, Push
from .memory import PoolMemory

_SO_PEERPIDFD = 77  # Linux 6.5; not in Python's socket module yet
_UCRED = struct.Struct("3i")


class ShmWriter:
    """Writes from this worker's pool into the peer's."""

    name = "shm"
    immediate = True
    piece_bytes = WRITE_BYTES
    pending = False

    def __init__(
        self, mine: PoolMemory, layout: KVLayout, theirs: PoolMemory, their_layout: KVLayout
    ) -> None:
        assert layout.block_bytes == their_layout.block_bytes, "the handshake refuses others"
        self._mine, self._theirs = mine, theirs  # held: the addresses are theirs
        self._block_bytes = layout.block_bytes
        self._num_blocks = their_layout.num_blocks
        self._from, self._from_layer = mine.address, layout.layer_bytes
        self._to, self._to_layer = theirs.address, their_layout.layer_bytes

    def write(self, push: Push, layers: range) -> None:
        size = self._block_bytes
        for layer in layers:
            here = self._from + layer * self._from_layer
            there = self._to + layer * self._to_layer
            for source, target, count in push.runs:
                memmove(there + target * size, here + source * size, count * size)

    def write_now(self, push: Push, layers: range) -> None:
        self.write(push, layers)

    def flush(self) -> None:
        """Nothing is ever left over."""

    def leave(self) -> bool:
        return False

    def close(self) -> None:
        self._theirs.unmap()

    def write_canary(self, slot: int, pattern: bytes) -> None:
        self._theirs.put_canary(slot, pattern)


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end of a unix socket."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(packed)[1]


def peer_pidfd(sock: socket.socket) -> int:
    """A descriptor that becomes readable when the process at the other end is dead.

    All its threads have left their memory by then, so nothing can write any more: the proof
    that frees a hung writer's blocks. Raises OSError where the kernel has none for us.
    """
    with contextlib.suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid = _UCRED.unpack(packed)[0]
    if pid <= 0:
        raise ProcessLookupError("the peer is in another process namespace")
    return os.pidfd_open(pid)
