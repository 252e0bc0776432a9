"""One connection to a peer: its sockets, its copier and what is known of the other end."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import select
import socket
import time
from dataclasses import dataclass, field

from ..engine.request import WorkerId
from .copier import Copier, Reader, Writer
from .events import Ended, Outcome, PairStatus
from .fit import Fit
from .handshake import Hello
from .messages import Message, encode, split
from .vigil import Vigil

_READ_BYTES = 1 << 16
_MAX_OUTBOX = 4 << 20  # a peer that reads nothing while this much gathers is given up


class Life(enum.Enum):
    OPEN = enum.auto()
    DYING = enum.auto()  # nothing new; kept until nobody can write any more
    CLOSED = enum.auto()


@dataclass(kw_only=True)
class Pair:
    """A connected peer. Mutable; owned by the switchboard, on the loop."""

    number: int
    hello: Hello
    fit: Fit  # what either side sends the other
    sock: socket.socket  # control
    data: socket.socket | None  # TCP payload, or announcements of a group's
    pidfd: int  # -1 over TCP
    writer: Writer
    copier: Copier
    reader: Reader | None  # where this side writes what arrives
    pattern: bytes  # of our canary
    heard_s: float
    ready: asyncio.Future[None]
    life: Life = Life.OPEN
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    vigil: Vigil = field(default_factory=Vigil)
    poll: select.poll = field(default_factory=select.poll)  # of both sockets
    reached: bool = False  # the peer saw our canary
    expected: bytes | None = None  # the peer's canary, until it is seen
    answered: bool = False  # we saw the peer's
    peer_is_out: bool = False  # its copier left our blocks for good, or it is dead
    copier_is_out: bool = False  # ours touches no block any more
    copier_ended: bool = False  # and its thread is over
    num_bytes: int = 0
    transfers: int = 0
    failures: int = 0
    exposed_s: float = 0.0

    def __post_init__(self) -> None:
        for sock in filter(None, (self.sock, self.data)):
            self.poll.register(sock, select.POLLIN)

    @property
    def peer(self) -> WorkerId:
        return self.hello.worker

    @property
    def transport(self) -> str:
        return self.writer.name

    @property
    def is_ready(self) -> bool:
        return self.life is Life.OPEN and self.reached and self.answered

    async def proven(self, within_s: float) -> bool:
        """Whether each side sees the other's canary in time. Raises PeerUnavailable if the pair
        ends before."""
        await asyncio.wait([self.ready], timeout=within_s)
        return self.ready.done() and self.ready.result() is None

    def note(self, ended: Ended) -> None:
        """Count a lease's end."""
        if ended.outcome is not Outcome.COMMITTED:
            self.failures += 1
            return
        self.transfers += 1
        self.num_bytes += ended.num_bytes
        self.exposed_s += ended.exposed_s

    def status(self, *, live_leases: int, quarantined_blocks: int) -> PairStatus:
        """As it stands; the counts are the lease tables'."""
        return PairStatus(
            peer=self.peer,
            transport=self.transport,
            ready=self.is_ready,
            num_bytes=self.num_bytes,
            transfers=self.transfers,
            failures=self.failures,
            exposed_s=self.exposed_s,
            live_leases=live_leases,
            quarantined_blocks=quarantined_blocks,
        )

    def heard(self, now_s: float) -> None:
        """The peer said something on the control connection."""
        self.heard_s = now_s
        self.vigil.heard(now_s)

    def wait_for_word(self, until_s: float) -> list[int]:
        """Its sockets, by descriptor, on which something came before `until_s`: none at the end.
        Awake all the time, but behind whoever else wants this core."""
        while time.monotonic() < until_s:
            if ready := self.poll.poll(0):
                return [fd for fd, _ in ready]
            os.sched_yield()
        return []

    def read(self) -> list[Message]:
        """What has arrived. Raises MalformedFrame, OSError at the end of the connection."""
        try:
            data = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return split(self.inbox)
        if not data:
            raise ConnectionResetError("connection closed")
        self.inbox += data
        return split(self.inbox)

    def write(self, message: Message) -> bool:
        """Send, or keep what does not go at once; True: something waits for `flush`.

        Raises OSError when the connection is gone or its reader has stopped reading.
        """
        frame = encode(message)
        if self.outbox:
            self.outbox += frame
            if len(self.outbox) > _MAX_OUTBOX:
                raise ConnectionResetError("the peer does not read")
            return True
        try:
            done = self.sock.send(frame)
        except BlockingIOError:
            done = 0
        self.outbox += frame[done:]
        return bool(self.outbox)

    def flush(self) -> bool:
        """Send what waits; True: some still does."""
        with contextlib.suppress(BlockingIOError):
            del self.outbox[: self.sock.send(self.outbox)]
        return bool(self.outbox)

    def process_is_dead(self) -> bool:
        """Known for a peer on this host only."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def release(self) -> None:
        """Give back sockets and descriptors. The copier is out; where it waits for a peer that
        hangs, and touches no block, its thread ends by itself."""
        if self.copier_ended or not self.writer.leave():
            self.copier.join()
        self.writer.close()
        self.sock.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
