"""What a contact's transport is made of on this side: a way out of the pool, and one into it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..engine.layout import KVLayout
from .contact import Contact
from .copier import Reader, Writer
from .fit import Way
from .lease import Action
from .lease_receiver import ReceiverTable
from .memory import KVMemory, PoolMemory
from .resharded import ReshardedShmWriter, ReshardedTcpReader, ReshardedTcpWriter
from .shm import ShmWriter
from .tcp import TcpReader, TcpWriter

if TYPE_CHECKING:  # torch comes with the first group only
    from .words import Words

Broke = Callable[[int, str], None]


class Transports:
    """`took` is called with what a reader's writes led to, where it tells by itself."""

    def __init__(
        self,
        layout: KVLayout,
        memory: KVMemory,
        table: ReceiverTable,
        took: Callable[[list[Action]], None],
    ) -> None:
        self._layout, self._memory, self._table, self._took = layout, memory, table, took

    def join(self, contact: Contact, broke: Broke) -> tuple[Writer, Reader | None]:
        """No reader where the peer writes into this pool. `broke(number, reason)` may be called
        later, when the transport is of no more use."""
        if contact.memory is not None:
            return self._join_neighbour(contact), None
        assert contact.data is not None, "a contact has one way or the other"
        if contact.group is not None:
            return self._join_group(contact, broke)
        return self._join_tcp(contact, contact.data)

    def _join_neighbour(self, contact: Contact) -> Writer:
        theirs, layout, out = contact.memory, contact.hello.layout, contact.fit.out
        if isinstance(theirs, PoolMemory):
            assert isinstance(self._memory, PoolMemory), "a GPU's worker does not take shm"
            if not out.is_plain:
                return ReshardedShmWriter(self._memory, theirs, out)
            return ShmWriter(self._memory, self._layout, theirs, layout)
        from .device_memory import DeviceMemory

        assert isinstance(self._memory, DeviceMemory) and theirs is not None, "a GPU's neighbour"
        if not out.is_plain:
            from .resharded_group import ReshardedCudaIpcWriter

            return ReshardedCudaIpcWriter(self._memory, theirs, out)
        from .cuda_ipc import CudaIpcWriter

        return CudaIpcWriter(self._memory, self._layout, theirs, layout)

    def _join_tcp(self, contact: Contact, data: socket.socket) -> tuple[Writer, Reader]:
        assert isinstance(self._memory, PoolMemory), "a GPU's worker does not take tcp"
        mine, table, number = self._memory, self._table, contact.number
        out, into = contact.fit.out, contact.fit.into
        if into.is_plain:
            reader = TcpReader(data, mine, self._layout, table, number)
        else:
            reader = ReshardedTcpReader(data, mine, table, number, into.mine)
        if out.is_plain:
            return TcpWriter(mine, self._layout, data), reader
        return ReshardedTcpWriter(mine, data, out.mine), reader

    def _words(self, way: Way) -> Words:
        from .words import Words

        if way.is_plain:
            return Words(self._memory, self._layout)
        from .resharded_group import WindowWords

        return WindowWords(self._memory, way.mine)

    def _join_group(self, contact: Contact, broke: Broke) -> tuple[Writer, Reader | None]:
        from .collective import CollectiveReader, CollectiveWriter  # torch comes with the first

        assert contact.data is not None and contact.group is not None, "both stand"
        number, fit = contact.number, contact.fit
        reader = CollectiveReader(
            contact.data,
            contact.group,
            self._memory,
            self._words(fit.into),
            self._table,
            number,
            took=self._took,
            broke=lambda reason: broke(number, reason),
        )
        name = contact.hello.transport
        return CollectiveWriter(name, self._words(fit.out), contact.group, contact.data), reader
