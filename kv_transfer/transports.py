"""What a contact's transport is made of on this side: a way out of the pool, and one into it."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.layout import KVLayout
from .caller import Contact
from .copier import Reader, Writer
from .lease import Action
from .lease_receiver import ReceiverTable
from .memory import KVMemory, PoolMemory
from .shm import ShmWriter
from .tcp import TcpReader, TcpWriter

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
        assert isinstance(self._memory, PoolMemory), "a GPU's worker does not take tcp"
        mine = (self._memory, self._layout)
        reader = TcpReader(contact.data, *mine, self._table, contact.number)
        return TcpWriter(*mine, contact.data), reader

    def _join_neighbour(self, contact: Contact) -> Writer:
        theirs, layout = contact.memory, contact.hello.layout
        if isinstance(theirs, PoolMemory):
            assert isinstance(self._memory, PoolMemory), "a GPU's worker does not take shm"
            return ShmWriter(self._memory, self._layout, theirs, layout)
        from .cuda_ipc import CudaIpcWriter
        from .device_memory import DeviceMemory

        assert isinstance(self._memory, DeviceMemory) and theirs is not None, "a GPU's neighbour"
        return CudaIpcWriter(self._memory, self._layout, theirs, layout)

    def _join_group(self, contact: Contact, broke: Broke) -> tuple[Writer, Reader | None]:
        from .collective import CollectiveReader, CollectiveWriter  # torch comes with the first

        assert contact.data is not None and contact.group is not None, "both stand"
        mine, number = (self._memory, self._layout), contact.number
        reader = CollectiveReader(
            contact.data,
            contact.group,
            *mine,
            self._table,
            number,
            took=self._took,
            broke=lambda reason: broke(number, reason),
        )
        name = contact.hello.transport
        return CollectiveWriter(name, *mine, contact.group, contact.data), reader
