"""How two endpoints meet: who they are, whether their pools fit, and by which transport.

Every connection begins with four bytes. On a control connection the caller's hello follows and
the called one's, or a refusal with its reason; over a unix socket each passes its pool's
descriptor. On a data connection the token follows that the called one gave.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Any

import msgpack

from ..engine.layout import KVLayout
from ..engine.request import WorkerId
from .events import PeerRefused
from .fit import Fit, Held, Holds, held, meet
from .memory import PoolMemory
from .messages import HEAD, MalformedFrame, check_body, framed

PROTOCOL = 5
CONTROL, DATA = b"PWKC", b"PWKD"
TOKEN_BYTES = 16
_MAX_HELLO = 1 << 14
_WHOLE = ("num_layers", "num_kv_heads")
_SHAPE = ("num_layers", "num_kv_heads", "block_size", "head_dim", "dtype", "fingerprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What each side tells the other of itself."""

    worker: WorkerId
    wants: WorkerId | None  # whom the caller means to reach; None from the called one
    layout: KVLayout
    rank: int  # of its worker's ranks
    holds: tuple[Holds, ...]  # what each of them holds
    pool_bytes: int
    canary_slot: int  # where the peer shall write its canary
    checksum: bool
    transport: str  # what the caller wants, and the called one agrees to
    token: bytes = b""  # of the data connection
    handle: bytes = b""  # of a pool on a GPU, for a neighbour
    store: int = 0  # port of the called one's store, where the transport is a group


@dataclass(kw_only=True, slots=True)
class Received:
    """A hello, the pool descriptor that came with it, and bytes that followed it."""

    hello: Hello
    fd: int | None
    rest: bytes


async def say(sock: socket.socket, hello: Hello, fd: int | None, preface: bytes = b"") -> None:
    layout = {name: getattr(hello.layout, name) for name in (*_SHAPE, "num_blocks")}
    fields = {
        "protocol": PROTOCOL,
        "worker": (hello.worker.name, hello.worker.incarnation),
        "wants": (hello.wants.name, hello.wants.incarnation) if hello.wants else None,
        "layout": layout,
        "rank": hello.rank,
        "holds": hello.holds,
        "pool_bytes": hello.pool_bytes,
        "canary_slot": hello.canary_slot,
        "checksum": hello.checksum,
        "transport": hello.transport,
        "token": hello.token,
        "handle": hello.handle,
        "store": hello.store,
    }
    frame = _framed(fields)
    if fd is None:
        await asyncio.get_running_loop().sock_sendall(sock, preface + frame)
        return
    if preface:  # apart: a descriptor is delivered with the first byte of its own send
        sock.send(preface)
    socket.send_fds(sock, [frame], [fd])  # a fresh socket takes a hello whole


async def refuse(sock: socket.socket, reason: str) -> None:
    frame = _framed({"refused": reason})
    await asyncio.get_running_loop().sock_sendall(sock, frame)


async def hear(sock: socket.socket) -> Received:
    """The peer's hello. Raises PeerRefused, MalformedFrame or OSError; bound it in time."""
    data, fds = bytearray(), list[int]()
    try:
        while len(data) < HEAD.size or len(data) < HEAD.size + _head(data)[0]:
            await _readable(sock)
            more, passed, _, _ = socket.recv_fds(sock, _MAX_HELLO, 4)
            fds += passed
            if not more:
                raise ConnectionResetError("closed in the handshake")
            data += more
        length, crc = _head(data)
        end = HEAD.size + length
        body = bytes(data[HEAD.size : end])
        check_body(body, crc)
        hello = _parse(body)
        fd = fds.pop(0) if fds else None
        return Received(hello=hello, fd=fd, rest=bytes(data[end:]))
    finally:
        for fd in fds:
            os.close(fd)


def fit_of(mine: Held, hello: Hello) -> Fit:
    """How the two pools exchange blocks. Raises PeerRefused with what keeps them from it."""
    if hello.pool_bytes != hello.layout.num_bytes:
        raise PeerRefused(
            f"a pool of {hello.pool_bytes} bytes for a layout of {hello.layout.num_bytes}"
        )
    try:
        theirs = held(hello.rank, hello.holds, hello.layout)
    except ValueError as error:
        raise PeerRefused(str(error)) from None
    for name, here, there in zip(_WHOLE, _sizes(mine.holds), _sizes(hello.holds), strict=True):
        if here != there:
            raise PeerRefused(f"{name} is {here} here and {there} there")
    return meet(mine, theirs)


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(sock, size - len(data))
        if not more:
            raise ConnectionResetError("closed in the handshake")
        data += more
    return data


def attach(received: Received) -> PoolMemory:
    """Map the pool whose descriptor came with a hello."""
    if received.fd is None:
        raise MalformedFrame("a hello over a unix socket without its pool")
    fd, received.fd = received.fd, None
    return PoolMemory.attach(fd, received.hello.pool_bytes)


def _framed(fields: dict[str, Any]) -> bytes:
    body = msgpack.packb(fields)
    assert body is not None, "a dictionary packs"
    return framed(body)


def _head(data: bytearray) -> tuple[int, int]:
    length, crc = HEAD.unpack_from(data)
    if length > _MAX_HELLO:
        raise MalformedFrame(f"a hello of {length} bytes")
    return length, crc


def _parse(body: bytes) -> Hello:
    try:
        fields = msgpack.unpackb(body)
        if "refused" in fields:
            raise PeerRefused(str(fields["refused"]))
        if fields["protocol"] != PROTOCOL:
            raise PeerRefused(f"protocol {fields['protocol']} there and {PROTOCOL} here; upgrade")
        return Hello(
            worker=_worker(fields["worker"]),
            wants=_worker(fields["wants"]) if fields["wants"] else None,
            layout=_layout(fields["layout"]),
            rank=int(fields["rank"]),
            holds=tuple(_holds(one) for one in fields["holds"]),
            pool_bytes=_positive(fields["pool_bytes"]),
            canary_slot=_positive(fields["canary_slot"], 1 << 32),
            checksum=bool(fields["checksum"]),
            transport=str(fields["transport"]),
            token=bytes(fields["token"]),
            handle=bytes(fields["handle"]),
            store=int(fields["store"]),
        )
    except PeerRefused:
        raise
    except Exception as error:  # msgpack and field access raise many kinds for hostile bytes
        raise MalformedFrame(f"not a hello: {type(error).__name__}") from error


def _worker(fields: list[Any]) -> WorkerId:
    name, incarnation = fields
    return WorkerId(name=str(name), incarnation=int(incarnation))


def _layout(fields: dict[str, Any]) -> KVLayout:
    numbers = ("num_layers", "num_blocks", "num_kv_heads", "block_size", "head_dim")
    sizes = {name: _positive(fields[name]) for name in numbers}
    return KVLayout(**sizes, dtype=str(fields["dtype"]), fingerprint=str(fields["fingerprint"]))


def _holds(numbers: list[Any]) -> Holds:
    first, stop, head, last = (int(number) for number in numbers)
    return first, stop, head, last


def _sizes(holds: tuple[Holds, ...]) -> tuple[int, int]:
    """Layers and KV heads of the whole model."""
    return max(one[1] for one in holds), max(one[3] for one in holds)


def _positive(value: Any, bound: int = 1 << 62) -> int:
    if type(value) is not int or not 0 < value < bound:
        raise ValueError("not a size")
    return value


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        with contextlib.suppress(ValueError):  # closed meanwhile
            loop.remove_reader(sock)
