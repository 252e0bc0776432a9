"""KV over a pair's process group: gathered on one side, scattered on the other.

What a frame holds goes ahead on the pair's data connection, as over TCP; its payload goes through
the group, one gathered buffer a layer (or several layers, where they are small), two in flight.
The receiver scatters on its loop, a bounded piece at a time: it alone writes its pool, so a
revoked lease is closed to writers at once.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .copier import Push
from .group import Group, GroupBroke, Transfer
from .lease import Action
from .lease_receiver import ReceiverTable
from .memory import CANARY_SLOT_BYTES, KVMemory
from .messages import MalformedFrame
from .words import BUFFER_BYTES, Words

SCATTER_BYTES = 2 << 20  # written in one turn of the loop: under a millisecond
_IN_FLIGHT = 2
_MAX_AHEAD = 8  # frames announced and not yet taken; an honest sender has two in flight
_HEADER = struct.Struct("<IIIIQQII")  # magic, kind, layer, layers, lease, generation, first, count
_MAGIC = 0x50574B47
_BLOCKS, _CANARY = 0, 1


class CollectiveWriter:
    """Sends from this worker's pool, in its copier's thread."""

    immediate = False
    piece_bytes = BUFFER_BYTES
    pending = False

    def __init__(self, name: str, words: Words, group: Group, sock: socket.socket) -> None:
        self.name = name
        self._group, self._sock = group, sock
        self._words = words
        self._buffers: list[Tensor | None] = [None] * _IN_FLIGHT
        self._sending: list[Transfer | None] = [None] * _IN_FLIGHT
        self._turn = 0
        self._reading = threading.Lock()  # held while the pool is read
        self._left = False

    def write(self, push: Push, layers: range) -> None:
        for part, first, count in _parts(layers, len(push.source), self._words.block_bytes):
            self._send(push, part, first, count)

    def write_now(self, push: Push, layers: range) -> None:
        raise AssertionError("a group is written in the copier's thread only")

    def flush(self) -> None:
        """Nothing to wait for: the receiver counts what arrives before it commits."""

    def leave(self) -> bool:
        """Read no more of the pool, for good; what is gathered may still be on its way."""
        with self._reading:
            self._left = True
        self._group.abandon()
        return True

    def close(self) -> None:
        self._sock.close()

    def write_canary(self, slot: int, pattern: bytes) -> None:
        header = _HEADER.pack(_MAGIC, _CANARY, 0, 0, 0, 0, slot, len(pattern))
        self._sock.sendall(header + pattern)

    def _send(self, push: Push, layers: range, first: int, count: int) -> None:
        slot = self._turn % _IN_FLIGHT
        self._turn += 1
        buffer = self._buffer(slot)
        header = (push.lease, push.generation, push.first + first, count)
        layer = layers.start - self._words.first_layer
        self._sock.sendall(_HEADER.pack(_MAGIC, _BLOCKS, layer, len(layers), *header))
        source = push.source[first : first + count]
        with self._reading, self._group.on_stream():
            if self._left:
                raise GroupBroke("the pair ended")
            self._group.wait_on_stream(push.clock.mark_of(layers.stop - 1))
            payload = self._words.gather(layers, source, buffer)
            self._group.wait_for_device()
        self._sending[slot] = self._group.send(payload)

    def _buffer(self, slot: int) -> Tensor:
        """A staging buffer whose last payload has left it."""
        sending, self._sending[slot] = self._sending[slot], None
        if sending is not None:
            sending.wait()
        buffer = self._buffers[slot]
        if buffer is None:
            with self._group.on_stream():
                buffer = self._buffers[slot] = self._words.staging()
        return buffer


@dataclass(kw_only=True, slots=True)
class _Frame:
    """Blocks `[first, first + count)` of a lease in `layers`, on their way into a buffer."""

    layers: range
    lease: int
    generation: int
    first: int
    count: int
    buffer: Tensor | None = None
    transfer: Transfer | None = None
    pieces: deque[tuple[int, int, int]] = field(default_factory=deque)  # layer's index, blocks


class CollectiveReader:
    """Takes what a peer's CollectiveWriter sends. Lives on the loop, but for a thread that waits.

    `took` is called on the loop with what a scattered frame led to, `broke` when the group is of
    no more use.
    """

    def __init__(
        self,
        sock: socket.socket,
        group: Group,
        memory: KVMemory,
        words: Words,
        table: ReceiverTable,
        pair: int,
        *,
        took: Callable[[list[Action]], None],
        broke: Callable[[str], None],
    ) -> None:
        self._sock, self._group, self._memory, self._words = sock, group, memory, words
        self._table, self._pair, self._took, self._broke = table, pair, took, broke
        self._loop = asyncio.get_running_loop()
        self._inbox = bytearray()
        self._announced: deque[_Frame] = deque()
        self._landed: deque[_Frame] = deque()
        self._free: list[Tensor | None] = [None] * _IN_FLIGHT
        self._closed = False
        self._coming: queue.SimpleQueue[_Frame | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="kv-receiver", daemon=True)
        self._thread.start()

    def read(self, now_s: float) -> list[Action]:
        """What was announced; receives for it are posted. Raises MalformedFrame, or OSError
        when it is over."""
        try:
            data = self._sock.recv(1 << 14, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the data connection was closed")
        self._inbox += data
        while len(self._inbox) >= _HEADER.size and self._parse():
            pass
        self._post()
        return []

    def close(self) -> None:
        """No byte is written from now on. The thread ends by itself: at once, or when the
        receive it waits for has failed; that one writes a staging buffer only."""
        self._closed = True
        self._announced.clear()
        self._landed.clear()
        self._coming.put(None)

    def _parse(self) -> bool:
        """Take one header off the inbox, with its canary; False while that is incomplete."""
        magic, kind, layer, layers, *rest = _HEADER.unpack_from(self._inbox)
        lease, generation, first, count = rest
        if magic != _MAGIC or kind not in (_BLOCKS, _CANARY):
            raise MalformedFrame("the data connection lost its framing")
        end = _HEADER.size
        if kind == _CANARY:
            end += CANARY_SLOT_BYTES
            if count != CANARY_SLOT_BYTES:
                raise MalformedFrame("a canary of another size")
            if len(self._inbox) < end:
                return False
            self._memory.put_canary(first, bytes(self._inbox[_HEADER.size : end]))
        else:
            if not layers or layer + layers > self._words.num_layers:
                raise MalformedFrame(f"a frame of layers {layer} to {layer + layers}")
            size = layers * count * self._words.block_bytes
            if not 0 < size <= self._words.staging_bytes:
                raise MalformedFrame(f"a frame of {size} bytes")
            if len(self._announced) >= _MAX_AHEAD:
                raise MalformedFrame(f"{_MAX_AHEAD} frames were announced and not sent")
            frame = _Frame(
                layers=range(layer, layer + layers),
                lease=lease,
                generation=generation,
                first=first,
                count=count,
            )
            self._announced.append(frame)
        del self._inbox[:end]
        return True

    def _post(self) -> None:
        """Start receives while there are buffers."""
        while self._announced and self._free and not self._closed:
            frame = self._announced.popleft()
            buffer = self._free.pop()
            if buffer is None:
                with self._group.on_stream():
                    buffer = self._words.staging()
            frame.buffer = buffer
            payload = self._words.part(frame.buffer, len(frame.layers), frame.count)
            frame.transfer = self._group.receive(payload)
            self._coming.put(frame)

    def _wait(self) -> None:
        """The thread: one receive after the other, as they were posted."""
        try:
            with self._group.on_stream():
                self._words.warm_up()
            while (frame := self._coming.get()) is not None and not self._closed:
                assert frame.transfer is not None, "it was posted"
                frame.transfer.wait()
                self._call(self._land, frame)
        except Exception as error:  # a compiler's or a driver's, too: nothing more will land
            self._call(self._broke, str(error))

    def _call(self, what: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, argument)
        except RuntimeError:  # the loop was closed without `close`
            self._closed = True

    def _land(self, frame: _Frame) -> None:
        size, rows = self._words.block_bytes, range(frame.count)
        most = max(1, SCATTER_BYTES // size)
        for index in range(len(frame.layers)):
            frame.pieces += [(index, at, min(most, frame.count - at)) for at in rows[::most]]
        self._landed.append(frame)
        if len(self._landed) == 1:
            self._scatter()

    def _scatter(self) -> None:
        """A bounded piece of the oldest frame; the rest in later turns of the loop."""
        if self._closed or not self._landed:
            return
        frame, budget = self._landed[0], SCATTER_BYTES
        actions: list[Action] = []
        while frame.pieces and budget > 0:
            index, start, count = frame.pieces.popleft()
            actions += self._scatter_piece(frame, index, start, count)
            budget -= count * self._words.block_bytes
        if not frame.pieces:
            self._landed.popleft()
            self._free.append(frame.buffer)
            try:
                self._post()
            except GroupBroke as error:
                self._broke(str(error))
        if self._landed:
            self._loop.call_soon(self._scatter)
        if actions:
            self._took(actions)

    def _scatter_piece(self, frame: _Frame, index: int, start: int, count: int) -> list[Action]:
        """Refused by the lease table: dropped, as the peer may be late in hearing of an end."""
        lease = (self._pair, frame.lease, frame.generation, frame.layers[index])
        blocks = self._table.begin_write(*lease, frame.first + start, count)
        if blocks is None:
            return []
        assert frame.buffer is not None, "it landed in one"
        payload = self._words.part(frame.buffer, len(frame.layers), frame.count)
        with self._group.on_stream():
            rows = payload[index, start : start + count]
            self._words.scatter(rows, frame.layers[index], blocks)
            self._group.wait_for_device()
        return self._table.wrote(*lease, frame.first + start, count, self._loop.time())


def _parts(layers: range, count: int, block_bytes: int) -> list[tuple[range, int, int]]:
    """What goes as one frame each: (layers, first block, how many), none above a buffer."""
    most = max(1, BUFFER_BYTES // block_bytes)  # blocks
    if count > most:
        pieces = [(first, min(most, count - first)) for first in range(0, count, most)]
        return [(range(layer, layer + 1), *piece) for layer in layers for piece in pieces]
    step = most // count
    starts = range(layers.start, layers.stop, step)
    return [(range(at, min(at + step, layers.stop)), 0, count) for at in starts]
