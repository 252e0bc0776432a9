"""TCP: scatter-gather I/O straight from the sender's pool and into the receiver's.

The receiver reads on its loop, a bounded piece at a time: it alone writes its pool, so a lease
that is revoked is closed to writers at once, even in the middle of a frame.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.layout import KVLayout
from .copier import WRITE_BYTES, Push, runs
from .lease import Action
from .lease_receiver import ReceiverTable
from .memory import CANARY_SLOT_BYTES, PoolMemory
from .messages import MalformedFrame

_HEADER = struct.Struct("<IIQQII")  # magic, layer, lease, generation, first, count
_MAGIC = 0x50574B56
_CANARY = 0xFFFFFFFF  # as a layer: the payload is a canary for slot `first`
_MAX_PIECES = 512  # buffers a system call takes (IOV_MAX is 1024)
READ_BYTES = 2 << 20  # read at most this much in one turn of the loop: under a millisecond
LOW_WATER = 512 << 10  # of a large frame so much is read at once; well below SOCKET_BUFFER
SOCKET_BUFFER = 4 << 20


def prepare(sock: socket.socket) -> None:
    """Options of control and data connections alike."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class TcpWriter:
    """Sends from this worker's pool. The socket is blocking; `shutdown` frees a stuck write."""

    name = "tcp"
    immediate = True
    piece_bytes = WRITE_BYTES

    def __init__(self, mine: PoolMemory, layout: KVLayout, sock: socket.socket) -> None:
        self._buffer = mine.buffer
        self._layout = layout
        self._sock = sock
        self._left: list[memoryview] = []  # frames that `write_now` could not send at once

    def write(self, push: Push, layers: range) -> None:
        self.flush()
        self._send([piece for layer in layers for piece in self._frame(push, layer)])

    @property
    def pending(self) -> bool:
        return bool(self._left)

    def write_now(self, push: Push, layers: range) -> None:
        self._left += [piece for layer in layers for piece in self._frame(push, layer)]
        try:
            done = self._sock.sendmsg(self._left[:_MAX_PIECES], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        _advance(self._left, done)

    def flush(self) -> None:
        left, self._left = self._left, []
        self._send(left)

    def leave(self) -> bool:
        return False  # a write under way ends at once, as its socket was shut down

    def close(self) -> None:
        self._sock.close()

    def write_canary(self, slot: int, pattern: bytes) -> None:
        header = _HEADER.pack(_MAGIC, _CANARY, 0, 0, slot, len(pattern))
        self._send([memoryview(header + pattern)])

    def _frame(self, push: Push, layer: int) -> list[memoryview]:
        """A layer's blocks with their header, as pieces to send."""
        pieces = [self._header(push, layer)]
        size, start = self._layout.block_bytes, self._layout.offset(layer, 0)
        for block, _, count in push.runs:
            at = start + block * size
            pieces.append(self._buffer[at : at + count * size])
        return pieces

    def _header(self, push: Push, layer: int) -> memoryview:
        head = (layer, push.lease, push.generation, push.first, len(push.source))
        return memoryview(_HEADER.pack(_MAGIC, *head))

    def _send(self, pieces: list[memoryview]) -> None:
        while pieces:
            _advance(pieces, self._sock.sendmsg(pieces[:_MAX_PIECES]))


def _advance(pieces: list[memoryview], done: int) -> None:
    """Take the first `done` bytes off `pieces`."""
    at = 0
    while at < len(pieces) and done >= len(pieces[at]):
        done -= len(pieces[at])
        at += 1
    del pieces[:at]
    if done:
        pieces[0] = pieces[0][done:]


@dataclass(slots=True)
class _Frame:
    layer: int
    lease: int
    generation: int
    first: int
    count: int
    left: list[memoryview]  # where the rest of the payload goes
    size: int  # of the rest
    wanted: bool


class TcpReader:
    """Takes what a peer's TcpWriter sends. Lives on the loop; the socket is read without waiting.

    A write that the lease table refuses is read into a scrap buffer: the peer may be late in
    hearing of a revocation, which is no reason to lose the connection.
    """

    def __init__(
        self,
        sock: socket.socket,
        memory: PoolMemory,
        layout: KVLayout,
        table: ReceiverTable,
        pair: int,
    ) -> None:
        self._sock, self._memory, self._layout = sock, memory, layout
        self._table, self._pair = table, pair
        self._unit_bytes, self._num_units = layout.block_bytes, layout.num_blocks
        self._head = memoryview(bytearray(_HEADER.size))
        self._head_left = self._head
        self._frame: _Frame | None = None
        self._scrap = memoryview(bytearray(1 << 16))
        self._low_water = 1

    def read(self, now_s: float) -> list[Action]:
        """Take at most about READ_BYTES. Raises MalformedFrame, or OSError when it is over."""
        actions: list[Action] = []
        budget = READ_BYTES
        while budget > 0:
            pieces = self._pieces(budget)
            wanted = sum(map(len, pieces))
            try:
                done = self._sock.recvmsg_into(pieces, 0, socket.MSG_DONTWAIT)[0]
            except BlockingIOError:
                break
            if done == 0:
                raise ConnectionResetError("the data connection was closed")
            budget -= done
            actions += self._took(done, now_s)
            if done < wanted:
                break
        self._wake_at(1 if self._frame is None else min(self._frame.size, LOW_WATER))
        return actions

    def _wake_at(self, num_bytes: int) -> None:
        """Have the loop woken when so many bytes are here, or the connection is over. Of a frame
        that is on its way they are sure to come; woken for every segment, the loop would spend
        more time in turning than in reading."""
        if num_bytes != self._low_water:
            self._low_water = num_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def close(self) -> None:
        """Nothing is read any more: the socket is the writer's."""

    def _pieces(self, budget: int) -> list[memoryview]:
        """Where the next bytes go: the frame's rest, then the header after it."""
        frame = self._frame
        if frame is None:
            return [self._head_left]
        if frame.wanted and not self._still_wanted(frame):
            frame.wanted = False
            frame.left = self._scraps(frame.size)
        pieces = frame.left[:_MAX_PIECES]
        total = 0
        for at, piece in enumerate(pieces):
            total += len(piece)
            if total >= budget:
                return pieces[: at + 1]
        return pieces if len(pieces) < len(frame.left) else [*pieces, self._head_left]

    def _took(self, done: int, now_s: float) -> list[Action]:
        actions: list[Action] = []
        frame = self._frame
        if frame is not None:
            if done < frame.size:
                _advance(frame.left, done)
                frame.size -= done
                return []
            done -= frame.size
            self._frame = None
            actions = self._complete(frame, now_s)
        self._head_left = self._head_left[done:]
        if not self._head_left:
            self._head_left = self._head
            self._frame = self._begin()
        return actions

    def _begin(self) -> _Frame:
        magic, layer, lease, generation, first, count = _HEADER.unpack(self._head)
        if magic != _MAGIC:
            raise MalformedFrame("the data connection lost its framing")
        if layer == _CANARY:
            if count != CANARY_SLOT_BYTES:
                raise MalformedFrame("a canary of another size")
            slot = self._memory.canary(first)
            return _Frame(layer, 0, 0, first, 0, [slot], len(slot), False)
        if not 0 < count <= self._num_units:
            raise MalformedFrame(f"a frame of {count} blocks")
        total = count * self._unit_bytes
        blocks = self._table.begin_write(self._pair, lease, generation, layer, first, count)
        if blocks is None:
            scraps = self._scraps(total)
            return _Frame(layer, lease, generation, first, count, scraps, total, False)
        views = self._places(layer, blocks)
        return _Frame(layer, lease, generation, first, count, views, total, True)

    def _places(self, layer: int, blocks: Sequence[int]) -> list[memoryview]:
        """Where blocks of a layer stand here, neighbours as one."""
        size, start = self._layout.block_bytes, self._layout.offset(layer, 0)
        views = []
        for block, _, number in runs(blocks, blocks):
            at = start + block * size
            views.append(self._memory.buffer[at : at + number * size])
        return views

    def _complete(self, frame: _Frame, now_s: float) -> list[Action]:
        if not frame.wanted:
            return []
        return self._table.wrote(
            self._pair, frame.lease, frame.generation, frame.layer, frame.first, frame.count, now_s
        )

    def _still_wanted(self, frame: _Frame) -> bool:
        return self._table.writable(self._pair, frame.lease, frame.generation)

    def _scraps(self, size: int) -> list[memoryview]:
        whole, rest = divmod(size, len(self._scrap))
        return [self._scrap] * whole + ([self._scrap[:rest]] if rest else [])
