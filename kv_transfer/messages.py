"""What two endpoints say to each other about leases, and its form on the wire (msgpack)."""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter

import msgpack

from .events import Outcome

MAX_FRAME = 1 << 20  # bytes of one control frame; a grant of 200,000 blocks still fits
HEAD = struct.Struct("<II")  # before every frame: bytes of its body, and their CRC-32
_TYPES: dict[str, type] = {"int": int, "bool": bool, "str": str, "float": float, "bytes": bytes}


class MalformedFrame(ValueError):
    """Bytes that are no message of ours: the connection they came by is worth nothing."""


class LostFraming(MalformedFrame):
    """Nor can it be told where the next message starts."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Sender: grant me `num_blocks` of your blocks. `attempt` tells one ask for a lease from the
    next. `names` are what the first blocks are known as, for a receiver that holds some of
    them; they mean nothing here."""

    lease: int
    attempt: int
    num_blocks: int
    names: bytes = b""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Receiver: no room."""

    lease: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Receiver: write there. `generation` rises with every grant of a receiver; `attempt` is
    the ask's, or 0 for a fetch of parked KV. `blocks` are packed, see `pack_blocks`. The first
    `skip` blocks of the KV are here already: the lease is about those behind them."""

    lease: int
    generation: int
    attempt: int
    blocks: bytes
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """Sender: everything is written, and my copier is out of your blocks."""

    lease: int
    generation: int
    num_units: int  # as `lease.Extent` counts them
    num_layers: int
    num_tokens: int
    digest: int
    has_checksum: bool
    checksum: int
    exposed_s: float  # since the last layer was computed


@dataclass(frozen=True, slots=True)
class Committed:
    """Receiver: I have it all. Ends the lease on the sender."""

    lease: int
    generation: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Either side: this lease is over. `drained`, from the sender only: nothing of it will be
    written any more. Generation 0 withdraws the ask `attempt`."""

    lease: int
    generation: int
    attempt: int
    outcome: str
    reason: str
    from_sender: bool
    drained: bool


@dataclass(frozen=True, slots=True)
class Discard:
    """Receiver: nobody will fetch what you parked under this lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """Sender: so I have heard. Nothing is parked here under this lease."""

    lease: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Both: I live, and so do these leases. `sending` and `receiving` are packed pairs of
    (lease, generation); `seen` is the highest generation the peer's grants have reached."""

    sending: bytes
    receiving: bytes
    seen: int


@dataclass(frozen=True, slots=True)
class Canary:
    """I wrote `pattern` into your canary slot. Answered by Ready when it stands there."""

    pattern: bytes


@dataclass(frozen=True, slots=True)
class Ready:
    """Your canary arrived."""

    pattern: bytes


@dataclass(frozen=True, slots=True)
class Bye:
    """I close this connection, and my copier is out of all your blocks."""

    reason: str


Message = (
    Ask
    | Refuse
    | Grant
    | Sent
    | Committed
    | Abort
    | Discard
    | Discarded
    | Beat
    | Canary
    | Ready
    | Bye
)
_KINDS: tuple[type[Message], ...] = (
    Ask,
    Refuse,
    Grant,
    Sent,
    Committed,
    Abort,
    Discard,
    Discarded,
    Beat,
    Canary,
    Ready,
    Bye,
)
_pack = msgpack.Packer().pack  # kept: making one costs more than packing a message


def _getter(kind: type[Message]) -> Callable[[Message], tuple[object, ...]]:
    """All fields of a message, in order."""
    names = [field.name for field in fields(kind)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: (getattr(message, names[0]),)


_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
_VALUES = {kind: _getter(kind) for kind in _KINDS}
_FIELDS = {kind: tuple(_TYPES[str(f.type)] for f in fields(kind)) for kind in _KINDS}


_OUTCOMES = frozenset(outcome.value for outcome in Outcome)


def pack_blocks(blocks: tuple[int, ...]) -> bytes:
    return array("I", blocks).tobytes()


def unpack_blocks(packed: bytes) -> tuple[int, ...]:
    if len(packed) % 4:
        raise MalformedFrame("block list is cut")
    return tuple(array("I", packed))


def check_blocks(grant: Grant, num_blocks: int) -> None:
    """Raises MalformedFrame for a grant of blocks that the peer's pool does not have: a write
    over shared memory would leave it."""
    if max(unpack_blocks(grant.blocks), default=0) >= num_blocks:
        raise MalformedFrame(f"a grant beyond the {num_blocks} blocks of the peer's pool")


def pack_leases(leases: list[tuple[int, int]]) -> bytes:
    return array("Q", [number for lease in leases for number in lease]).tobytes()


def unpack_leases(packed: bytes) -> set[tuple[int, int]]:
    if len(packed) % 16:
        raise MalformedFrame("lease list is cut")
    numbers = array("Q", packed)
    return set(zip(numbers[::2], numbers[1::2], strict=True))


def framed(body: bytes) -> bytes:
    """With its head. TCP's own checksum is of 16 bits, and ends at whatever stands in between."""
    return HEAD.pack(len(body), zlib.crc32(body)) + body


def check_body(body: bytes, crc: int) -> None:
    """Raises MalformedFrame for a body that is not the one its head was made for."""
    if zlib.crc32(body) != crc:
        raise MalformedFrame("a frame was changed on its way")


def encode(message: Message) -> bytes:
    """A frame."""
    kind = type(message)
    body = _pack((_NUMBER[kind], *_VALUES[kind](message)))
    if len(body) > MAX_FRAME:
        raise MalformedFrame(f"frame of {len(body)} bytes; at most {MAX_FRAME} go")
    return framed(body)


def decode(body: bytes | memoryview) -> Message:
    """A frame's body as a message. Raises MalformedFrame for anything else."""
    try:
        number, *values = msgpack.unpackb(body)
        kind = _KINDS[number]
    except Exception as error:  # msgpack raises many kinds for hostile bytes
        raise MalformedFrame(f"not a message: {type(error).__name__}") from error
    if tuple(map(type, values)) != _FIELDS[kind]:
        raise MalformedFrame(f"{kind.__name__} with the wrong fields")
    for value in values:  # msgpack's integers end below 2^64
        if type(value) is int and value < 0:
            raise MalformedFrame(f"{kind.__name__} with a negative number")
    if kind is Abort and values[3] not in _OUTCOMES:
        raise MalformedFrame(f"unknown outcome {values[3]!r}")
    return kind(*values)


def split(buffer: bytearray) -> list[Message]:
    """Take the complete frames off the front of `buffer`.

    A malformed one is taken off too before it raises: a dying connection is still read, for the
    peer's word that its copier is out.
    """
    messages: list[Message] = []
    start = 0
    try:
        while len(buffer) - start >= HEAD.size:
            length, crc = HEAD.unpack_from(buffer, start)
            if length > MAX_FRAME:
                raise LostFraming(f"frame of {length} bytes; at most {MAX_FRAME} are taken")
            end = start + HEAD.size + length
            if len(buffer) < end:
                break
            body = bytes(buffer[start + HEAD.size : end])
            start = end
            check_body(body, crc)
            messages.append(decode(body))
    finally:
        del buffer[:start]
    return messages
