"""Transfers of a worker of several ranks, as if it were one endpoint.

Each rank's endpoint moves its own slice to its counterparts. The leader says what to do and gathers
what comes of it (`lease_parts`): a rank's part is to the worker's lease what a leg is to a rank's.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from ..engine.request import TransferAddress
from .courses import Leg
from .events import Asked, Ended, PairStatus, PeerRefused, PeerUnavailable, Released, Side
from .layer_clock import LayerClock
from .lease_parts import AskParts, Event, LeaseParts, PartSilent
from .rank_endpoint import RankEndpoint
from .rank_wire import (
    pack_address,
    pack_event,
    pack_legs,
    receive,
    send,
    unpack_address,
    unpack_event,
)

JOIN_S = 30.0  # for followers that are loaded already
CLOSE_S = 1.0
CALL_S = 30.0  # bound of a follower's answer; the endpoints' own bounds are shorter
OWN = 0  # the leader's own rank


class RankDoor:
    """Where a leader's followers bring their transfers. `address` is what they are told."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_hex(8)
        self.listener = socket.create_server((host, 0))
        self.address = f"{host}:{self.listener.getsockname()[1]}"


class RankedEndpoint:
    """`KVEndpoint` for a leader and its followers. All methods run on the worker's loop."""

    def __init__(self, own: RankEndpoint, door: RankDoor, num_ranks: int) -> None:
        self._own = own
        self._door = door
        self._ranks = range(num_ranks)
        self._followers: dict[int, asyncio.StreamWriter] = {}
        self._addresses: dict[int, TransferAddress] = {}
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._parts = LeaseParts(self._events.put_nowait, self.abort, self.discard)
        own.gave_up = self._on_given_up
        self._asked = AskParts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self._joined = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> TransferAddress:
        """Listen, with every follower. Raises PeerUnavailable when one does not come."""
        own = await self._own.start()
        self._spawn(self._follow_own())
        self._server = await asyncio.start_server(self._serve, sock=self._door.listener)
        try:
            async with asyncio.timeout(JOIN_S):
                await self._joined.wait()
        except TimeoutError:
            raise PeerUnavailable(f"{self._own.worker}: a rank brought no transfers") from None
        return replace(own, ranks=tuple(self._addresses[rank] for rank in self._ranks[1:]))

    async def connect(self, peer: TransferAddress) -> str:
        """As `KVEndpoint.connect`, every rank to all its counterparts."""
        own = self._own
        calls = [
            self._call(
                rank, "connect", [pack_address(a) for a in own.courses.counterparts(peer, rank)]
            )
            for rank in self._ranks[1:]
        ]
        return (await asyncio.gather(own.connect(peer), *calls))[0]

    def block_size(self, peer: TransferAddress) -> int:
        return self._own.block_size(peer)

    @property
    def mark(self) -> Callable[[], Any] | None:
        return self._own.mark

    def new_lease(self) -> int:
        return self._own.new_lease()

    # Prefill

    async def ask(
        self,
        peer: TransferAddress,
        lease: int,
        num_blocks: int,
        names: bytes = b"",
        num_tokens: int | None = None,
    ) -> bool:
        """As `KVEndpoint.ask`. Where only some ranks were granted, the lease has begun and ends."""
        legs = self._legs(peer, Side.SENDER)
        about = (lease, num_blocks, names, num_tokens)
        calls = {OWN: self._own.ask_legs(legs.pop(OWN), *about)}
        for rank, own in legs.items():
            calls[rank] = self._call(rank, "ask", pack_legs(own), *about)
        self._parts.open(lease, Side.SENDER, (), calls)
        return await self._parts.begin(lease, Side.SENDER, calls)

    def skipped(self, lease: int) -> int:
        """As `KVEndpoint.skipped`: decode's leader gives every rank the same answer."""
        return self._own.skipped(lease)

    def push(self, lease: int, blocks: Sequence[int], first: int, ready: LayerClock) -> None:
        self._own.push(lease, blocks, first, ready)
        self._tell_senders(lease, "push", lease, list(blocks), first, ready.step)

    def commit(self, lease: int, num_tokens: int, digest: int) -> None:
        self._own.commit(lease, num_tokens, digest)
        self._tell_senders(lease, "commit", lease, num_tokens, digest)

    def park(self, lease: int, blocks: Sequence[int], num_tokens: int, digest: int) -> None:
        """As `KVEndpoint.park`. The leader's step is over only when every rank's KV is there."""
        self._parts.open(lease, Side.SENDER, blocks, self._ranks)
        self._own.park(lease, blocks, num_tokens, digest)
        self._tell("park", lease, list(blocks), num_tokens, digest)

    # Decode

    async def grant(
        self,
        peer: TransferAddress,
        lease: int,
        blocks: Sequence[int],
        digest: int,
        skip: int = 0,
    ) -> None:
        """As `KVEndpoint.grant`. Where only some ranks could, the lease has begun and ends."""
        legs = self._legs(peer, Side.RECEIVER)
        about = (lease, list(blocks), digest, skip)
        calls = {OWN: self._own.grant_legs(legs.pop(OWN), *about)}
        for rank, own in legs.items():
            calls[rank] = self._call(rank, "grant", pack_legs(own), *about)
        self._parts.open(lease, Side.RECEIVER, blocks, calls).source = peer
        await self._parts.begin(lease, Side.RECEIVER, calls)

    def answer(self, asked: Asked, blocks: Sequence[int] | None, skip: int = 0) -> bool:
        """As `KVEndpoint.answer`. A rank whose asker is gone ends the lease."""
        by_rank = self._asked.take(asked.lease)
        if not by_rank:
            return False
        if blocks is not None:
            self._parts.open(asked.lease, Side.RECEIVER, blocks, by_rank)
        for rank in self._ranks[1:]:
            taken = None if blocks is None else list(blocks)
            self._send(rank, [0, "answer", pack_event(by_rank[rank]), taken, skip])
        if not self._own.answer(by_rank[OWN], blocks, skip) and blocks is not None:
            self._parts.never_began(OWN, asked.lease, Side.RECEIVER)
        return True

    def discard(self, peer: TransferAddress, lease: int) -> None:
        """As `KVEndpoint.discard`: the peer's leader ends it for all its ranks."""
        self._own.discard(peer, lease)

    # Both

    def abort(self, lease: int) -> None:
        self._own.abort(lease)
        self._tell("abort", lease)

    async def events(self) -> AsyncIterator[Event]:
        """As `KVEndpoint.events`, of the whole worker."""
        while (event := await self._events.get()) is not None:
            yield event

    def pairs(self) -> tuple[PairStatus, ...]:
        """The leader's own: every rank's counterpart is of the same peer."""
        return self._own.pairs()

    def counters(self) -> dict[str, int]:
        return self._own.counters()

    async def close(self) -> None:
        await self._own.close()
        if self._server is not None:
            self._server.close()
        for writer in self._followers.values():
            writer.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_S)
        self._door.listener.close()
        for task in self._tasks:
            task.cancel()
        self._events.put_nowait(None)

    # Leases over ranks

    def _legs(self, peer: TransferAddress, side: Side) -> dict[int, tuple[Leg, ...]]:
        """Of every rank that has any. Raises PeerRefused."""
        found = {rank: self._own.courses.legs(peer, side, rank) for rank in self._ranks}
        assert found[OWN], "the leaders hold the first layer's first head and exchange it"
        return {rank: legs for rank, legs in found.items() if legs}

    def _on_event(self, rank: int, event: Event) -> None:
        match event:
            case Asked():
                now_s = asyncio.get_running_loop().time()
                whole = self._asked.add(rank, event.lease, event, len(self._ranks), now_s)
                if whole is not None:
                    self._events.put_nowait(whole)
            case Ended():
                if rank == OWN and event.side is Side.SENDER:
                    self._leave_out(event)
                self._parts.has_ended(rank, event.lease, event)
            case Released():
                self._parts.is_released(rank, event.lease)

    def _on_given_up(self, lease: int) -> None:
        """A receiver wants nothing of it any more: followers' parts may wait for a fetch."""
        if self._parts.get(lease, Side.SENDER) is not None:
            self._tell("abort", lease)

    def _leave_out(self, ended: Ended) -> None:
        """Ranks whose KV others hold as well were asked for nothing: theirs is parked no more."""
        idle = self._own.idle(ended.peer)
        for rank in idle:
            self._send(rank, [0, "abort", ended.lease])
        self._parts.leave_out(idle, ended.lease)

    # Followers

    async def _follow_own(self) -> None:
        async for event in self._own.events():
            self._on_event(OWN, event)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One follower's connection, to its end. Its death is the engine's to tell."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            secret, rank, address = await receive(reader)
            if not secrets.compare_digest(secret, self._door.secret) or rank in self._followers:
                return
            self._followers[rank] = writer
            self._addresses[rank] = unpack_address(address)
            if len(self._followers) == len(self._ranks) - 1:
                self._joined.set()
            while True:
                self._hear(rank, await receive(reader))
        except (asyncio.IncompleteReadError, OSError):
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(PeerUnavailable("a rank of this worker is gone"))
        finally:
            writer.close()

    def _hear(self, rank: int, frame: list[Any]) -> None:
        match frame:
            case ["event", name, fields]:
                self._on_event(rank, unpack_event(name, fields))
            case ["unanswered", lease]:
                self._parts.never_began(rank, lease, Side.RECEIVER)
            case ["not fetched", lease]:
                self._parts.was_not_fetched(rank, lease)
            case ["reply", number, value, reason]:
                future = self._calls.get(number)
                if future is None or future.done():
                    return
                if value in ("unavailable", "refused") and reason:
                    kind = PeerUnavailable if value == "unavailable" else PeerRefused
                    future.set_exception(kind(reason))
                else:
                    future.set_result(value)

    async def _call(self, rank: int, name: str, *arguments: Any) -> Any:
        """A follower's answer. Raises as its endpoint did, or PeerUnavailable."""
        number = next(self._numbers)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(rank, [number, name, *arguments])
            await asyncio.wait([future], timeout=CALL_S)
            if not future.done():
                raise PartSilent(f"rank {rank} of {self._own.worker} is silent")
            return future.result()
        finally:
            del self._calls[number]

    def _tell_senders(self, lease: int, name: str, *arguments: Any) -> None:
        """Followers that send a part of it."""
        entry = self._parts.get(lease, Side.SENDER)
        for rank in () if entry is None else entry.parts:
            if rank != OWN:
                self._send(rank, [0, name, *arguments])

    def _tell(self, name: str, *arguments: Any) -> None:
        for rank in self._ranks[1:]:
            self._send(rank, [0, name, *arguments])

    def _send(self, rank: int, frame: list[Any]) -> None:
        writer = self._followers.get(rank)
        if writer is not None and not writer.is_closing():
            send(writer, frame)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


Endpoint = RankEndpoint | RankedEndpoint
