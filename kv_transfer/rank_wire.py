"""What a worker's leader and its followers say to each other about transfers: frames of msgpack.

Both are one worker and of one version, behind a secret; what arrives is taken as it is.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgpack

from ..engine.request import TransferAddress, WorkerId
from .courses import Leg
from .events import Asked, Ended, Outcome, Released, Side
from .lease_parts import Event

_LENGTH = struct.Struct("<I")
_EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Asked, Ended, Released)}


def send(writer: asyncio.StreamWriter, frame: list[Any]) -> None:
    """Queue a frame; it goes when the loop does."""
    body = msgpack.packb(frame)
    assert body is not None, "a list packs"
    writer.write(_LENGTH.pack(len(body)) + body)


async def receive(reader: asyncio.StreamReader) -> list[Any]:
    """The next frame. Raises IncompleteReadError or OSError at the connection's end."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return msgpack.unpackb(await reader.readexactly(length))


def pack_event(event: Event) -> list[Any]:
    return [type(event).__name__, asdict(event)]


def unpack_event(name: str, fields: dict[str, Any]) -> Event:
    for key, restore in (("side", Side), ("outcome", Outcome), ("blocks", tuple)):
        if key in fields:
            fields[key] = restore(fields[key])
    if fields.get("peer") is not None:
        fields["peer"] = WorkerId(**fields["peer"])
    return _EVENTS[name](**fields)


def pack_legs(legs: Sequence[Leg]) -> list[Any]:
    return [[leg, pack_address(address)] for leg, address in legs]


def unpack_legs(packed: list[Any]) -> list[Leg]:
    return [(leg, unpack_address(address)) for leg, address in packed]


def pack_address(address: TransferAddress) -> dict[str, Any]:
    return asdict(address)


def unpack_address(fields: dict[str, Any]) -> TransferAddress:
    ranks = tuple(unpack_address(rank) for rank in fields.pop("ranks"))
    worker, holds = WorkerId(**fields["worker"]), tuple(fields["holds"])
    return TransferAddress(**(fields | {"worker": worker, "ranks": ranks, "holds": holds}))
