"""The transports between pools that hold other layers or heads, or blocks of another size.

Each is its plain one but for where the bytes lie: a layer's units are pieces in both pools, which
`Window` finds. Over a wire, layers count from the first that moves; a unit's pieces go in order,
so that each side joins what is contiguous in its own pool.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ctypes import memmove

from .copier import Push
from .fit import Way
from .lease_receiver import ReceiverTable
from .memory import PoolMemory
from .shm import ShmWriter
from .tcp import TcpReader, TcpWriter
from .window import Window, spans


class ReshardedShmWriter(ShmWriter):
    """One copy for each span that is contiguous in both pools."""

    def __init__(self, mine: PoolMemory, theirs: PoolMemory, way: Way) -> None:
        self._mine, self._theirs, self._way = mine, theirs, way

    def write(self, push: Push, layers: range) -> None:
        mine, theirs = self._way.mine, self._way.theirs
        copies = spans(mine, theirs, push.source, push.target).tolist()
        for layer in layers:
            index = layer - mine.layers.start
            here = self._mine.address + mine.layer_offset(index)
            there = self._theirs.address + theirs.layer_offset(index)
            for source, target, size in copies:
                memmove(there + target, here + source, size)


class ReshardedTcpWriter(TcpWriter):
    """Gathers from the pool's pieces."""

    def __init__(self, mine: PoolMemory, sock: socket.socket, window: Window) -> None:
        super().__init__(mine, window.layout, sock)
        self._window = window

    def _frame(self, push: Push, layer: int) -> list[memoryview]:
        index = layer - self._window.layers.start
        start = self._window.layer_offset(index)
        views = [
            self._buffer[start + offset : start + offset + size]
            for offset, size in self._window.runs(push.source)
        ]
        return [self._header(push, index), *views]


class ReshardedTcpReader(TcpReader):
    """Scatters into the pool's pieces."""

    def __init__(
        self,
        sock: socket.socket,
        memory: PoolMemory,
        table: ReceiverTable,
        pair: int,
        window: Window,
    ) -> None:
        super().__init__(sock, memory, window.layout, table, pair)
        self._window = window
        self._unit_bytes, self._num_units = window.unit_bytes, window.num_units

    def _places(self, layer: int, blocks: Sequence[int]) -> list[memoryview]:
        start = self._window.layer_offset(layer)
        return [
            self._memory.buffer[start + offset : start + offset + size]
            for offset, size in self._window.runs(blocks)
        ]
