"""An open connection to a peer that fits: what a call made or answered comes to."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .fit import Fit
from .handshake import Hello
from .memory import PoolMemory

if TYPE_CHECKING:  # torch comes with the first group only
    from .device_memory import PeerDeviceMemory
    from .group import Group

    PeerMemory = PoolMemory | PeerDeviceMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class Contact:
    """`number` is this side's name for it."""

    number: int
    hello: Hello
    fit: Fit
    sock: socket.socket
    rest: bytes  # control bytes that came right behind the hello
    data: socket.socket | None = None  # over TCP
    group: Group | None = None  # over TCP, where one carries the payload
    memory: PeerMemory | None = None  # a neighbour's pool, mapped here
    pidfd: int = -1  # of a neighbour


def drop_contact(contact: Contact) -> None:
    """Hang up on a contact that nobody will use."""
    contact.sock.close()
    if contact.data is not None:
        contact.data.close()
    if contact.memory is not None:
        contact.memory.close()
    if contact.pidfd >= 0:
        os.close(contact.pidfd)
