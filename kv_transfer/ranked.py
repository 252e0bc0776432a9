"""Transfers of a worker of several ranks, as if it were one endpoint.

Each rank's endpoint moves its own slice to its counterpart, under the lease's one id. The leader
says what to do and gathers what comes of it: a lease is committed when every rank's part is, and
fails as a whole when one fails; its blocks are released when no rank's writer can write any more.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.request import TransferAddress
from .endpoint import KVEndpoint
from .events import Asked, Ended, Outcome, PairStatus, PeerRefused, PeerUnavailable, Released, Side
from .layer_clock import LayerClock
from .rank_wire import Event, pack_address, pack_event, receive, send, unpack_address, unpack_event

JOIN_S = 30.0  # for followers that are loaded already
STALE_S = 10.0  # asks that not every rank has brought are dropped after this
CLOSE_S = 1.0
CALL_S = 10.0  # bound of a follower's answer; the endpoints' own bounds are shorter
OWN = 0  # the leader's own rank


class RankDoor:
    """Where a leader's followers bring their transfers. `address` is what they are told."""

    def __init__(self, host: str) -> None:
        self.secret = secrets.token_hex(8)
        self.listener = socket.create_server((host, 0))
        self.address = f"{host}:{self.listener.getsockname()[1]}"


@dataclass(kw_only=True, slots=True)
class _Lease:
    """A lease of this worker, over its ranks."""

    side: Side
    blocks: tuple[int, ...]
    ranks: set[int]  # that hold a part of it
    source: TransferAddress | None = None  # where it is fetched from
    ended: dict[int, Ended] = field(default_factory=dict)
    unreleased: set[int] = field(default_factory=set)  # failed, and may still be written to
    is_told: bool = False


class RankedEndpoint:
    """`KVEndpoint` for a leader and its followers. All methods run on the worker's loop."""

    def __init__(self, own: KVEndpoint, door: RankDoor, num_ranks: int) -> None:
        self._own = own
        self._door = door
        self._ranks = range(num_ranks)
        self._followers: dict[int, asyncio.StreamWriter] = {}
        self._addresses: dict[int, TransferAddress] = {}
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._leases: dict[tuple[int, Side], _Lease] = {}
        self._asked: dict[int, tuple[float, dict[int, Asked]]] = {}
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
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
        """As `KVEndpoint.connect`, every rank to its counterpart."""
        if len(peer.ranks) != len(self._ranks) - 1:
            raise PeerRefused(
                f"{peer.worker} has {len(peer.ranks) + 1} ranks and {self._own.worker} "
                f"{len(self._ranks)}: give both pools the same tensor_parallel and "
                "pipeline_parallel"
            )
        calls = [self._call(rank, "connect", _counterpart(peer, rank)) for rank in self._ranks[1:]]
        return (await asyncio.gather(self._own.connect(peer), *calls))[0]

    @property
    def mark(self) -> Callable[[], Any] | None:
        return self._own.mark

    def new_lease(self) -> int:
        return self._own.new_lease()

    # Prefill

    async def ask(
        self, peer: TransferAddress, lease: int, num_blocks: int, names: bytes = b""
    ) -> bool:
        """As `KVEndpoint.ask`. Where only some ranks were granted, the lease has begun and ends."""
        self._check_split(peer)
        self._open(lease, Side.SENDER, ())
        calls = [self._own.ask(peer, lease, num_blocks, names)]
        for rank in self._ranks[1:]:
            target = _counterpart(peer, rank)
            calls.append(self._call(rank, "ask", target, lease, num_blocks, names))
        return await self._begin(lease, Side.SENDER, calls)

    def skipped(self, lease: int) -> int:
        """As `KVEndpoint.skipped`: decode's leader gives every rank the same answer."""
        return self._own.skipped(lease)

    def push(self, lease: int, blocks: Sequence[int], first: int, ready: LayerClock) -> None:
        self._own.push(lease, blocks, first, ready)
        self._tell("push", lease, list(blocks), first, ready.step)

    def commit(self, lease: int, num_tokens: int, digest: int) -> None:
        self._own.commit(lease, num_tokens, digest)
        self._tell("commit", lease, num_tokens, digest)

    def park(self, lease: int, blocks: Sequence[int], num_tokens: int, digest: int) -> None:
        """As `KVEndpoint.park`. The leader's step is over only when every rank's KV is there."""
        self._open(lease, Side.SENDER, blocks)
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
        self._check_split(peer)
        self._open(lease, Side.RECEIVER, blocks).source = peer
        calls: list[Coroutine[Any, Any, Any]] = [self._own.grant(peer, lease, blocks, digest, skip)]
        for rank in self._ranks[1:]:
            target = _counterpart(peer, rank)
            calls.append(self._call(rank, "grant", target, lease, list(blocks), digest, skip))
        await self._begin(lease, Side.RECEIVER, calls)

    def answer(self, asked: Asked, blocks: Sequence[int] | None, skip: int = 0) -> bool:
        """As `KVEndpoint.answer`. A rank whose asker is gone ends the lease."""
        _, by_rank = self._asked.pop(asked.lease, (0.0, {}))
        if len(by_rank) < len(self._ranks):
            return False  # it was asked again, or given up, meanwhile
        if blocks is not None:
            self._open(asked.lease, Side.RECEIVER, blocks)
        for rank in self._ranks[1:]:
            taken = None if blocks is None else list(blocks)
            self._send(rank, [0, "answer", pack_event(by_rank[rank]), taken, skip])
        if not self._own.answer(by_rank[OWN], blocks, skip) and blocks is not None:
            self._never_began(OWN, asked.lease)
        return True

    def discard(self, peer: TransferAddress, lease: int) -> None:
        self._own.discard(peer, lease)
        for rank in self._ranks[1 : len(peer.ranks) + 1]:
            self._send(rank, [0, "discard", _counterpart(peer, rank), lease])

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

    def _check_split(self, peer: TransferAddress) -> None:
        if len(peer.ranks) != len(self._ranks) - 1:
            raise PeerRefused(f"{peer.worker} is split into other ranks than {self._own.worker}")

    def _open(self, lease: int, side: Side, blocks: Sequence[int]) -> _Lease:
        entry = _Lease(side=side, blocks=tuple(blocks), ranks=set(self._ranks))
        self._leases[lease, side] = entry
        return entry

    async def _begin(
        self, lease: int, side: Side, calls: Sequence[Coroutine[Any, Any, Any]]
    ) -> bool:
        """Whether it has begun, on any rank. Raises what every rank raised."""
        try:
            results = await asyncio.gather(*calls, return_exceptions=True)
        except asyncio.CancelledError:
            self._leases.pop((lease, side), None)  # whoever began to ask wants no more of it
            self.abort(lease)
            raise
        failed = [rank for rank, result in enumerate(results) if _is_failure(result)]
        if len(failed) == len(results):
            self._leases.pop((lease, side), None)
            errors = [result for result in results if isinstance(result, BaseException)]
            if errors:
                raise errors[0]
            return False
        for rank in failed:
            self._never_began(rank, lease, side)
        return True

    def _never_began(self, rank: int, lease: int, side: Side = Side.RECEIVER) -> None:
        """This rank has no part in a lease that others have: it ends for all."""
        entry = self._leases.get((lease, side))
        if entry is not None:
            reason = f"rank {rank} did not reach its counterpart"
            ended = Ended(
                lease=lease, side=side, peer=None, outcome=Outcome.LOST, reason=reason, blocks=()
            )
            self._end(rank, entry, ended, is_open=False)

    def _on_event(self, rank: int, event: Event) -> None:
        match event:
            case Asked():
                self._on_asked(rank, event)
            case Ended():
                entry = self._leases.get((event.lease, event.side))
                if entry is not None:
                    self._end(rank, entry, event, is_open=event.outcome is not Outcome.COMMITTED)
            case Released():
                entry = self._leases.get((event.lease, Side.RECEIVER))
                if entry is not None:
                    entry.unreleased.discard(rank)
                    self._release(event.lease, entry)

    def _on_asked(self, rank: int, asked: Asked) -> None:
        """Passed on when every rank's counterpart has asked."""
        now_s = asyncio.get_running_loop().time()
        for old in [key for key, (since_s, _) in self._asked.items() if since_s < now_s - STALE_S]:
            del self._asked[old]
        _, by_rank = self._asked.setdefault(asked.lease, (now_s, {}))
        by_rank[rank] = asked
        if len(by_rank) == len(self._ranks):
            self._events.put_nowait(by_rank[OWN])

    def _end(self, rank: int, entry: _Lease, ended: Ended, *, is_open: bool) -> None:
        """One rank's part is over; `is_open`: its blocks may still be written to."""
        fails_first = ended.outcome is not Outcome.COMMITTED and not any(
            other.outcome is not Outcome.COMMITTED for other in entry.ended.values()
        )
        entry.ended[rank] = ended
        if is_open and entry.side is Side.RECEIVER:
            entry.unreleased.add(rank)
        if entry.ended.keys() == entry.ranks:
            self._tell_end(entry)
        elif fails_first:
            self.abort(ended.lease)
            if entry.source is not None:  # a part that was never fetched may be dropped there
                self.discard(entry.source, ended.lease)

    def _tell_end(self, entry: _Lease) -> None:
        parts = [entry.ended[rank] for rank in sorted(entry.ended)]
        failures = [part for part in parts if part.outcome is not Outcome.COMMITTED]
        worst = failures[0] if failures else parts[OWN]
        if not failures and len({(part.digest, part.num_tokens) for part in parts}) > 1:
            worst = replace(worst, outcome=Outcome.ABORTED, reason="the ranks' KV differs")
        ended = replace(
            worst,
            peer=next((part.peer for part in parts if part.peer is not None), None),
            blocks=next((part.blocks for part in parts if part.blocks), entry.blocks),
            num_bytes=sum(part.num_bytes for part in parts),
            seconds=max(part.seconds for part in parts),
            exposed_s=max(part.exposed_s for part in parts),
        )
        self._events.put_nowait(ended)
        entry.is_told = True
        if entry.side is Side.SENDER or ended.outcome is Outcome.COMMITTED:
            del self._leases[ended.lease, entry.side]
        else:
            entry.blocks = ended.blocks
            self._release(ended.lease, entry)

    def _release(self, lease: int, entry: _Lease) -> None:
        if entry.is_told and not entry.unreleased:
            del self._leases[lease, Side.RECEIVER]
            self._events.put_nowait(Released(lease=lease, blocks=entry.blocks))

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
                self._never_began(rank, lease)
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
            async with asyncio.timeout(CALL_S):
                return await future
        except TimeoutError:
            raise PeerUnavailable(f"rank {rank} of {self._own.worker} is silent") from None
        finally:
            del self._calls[number]

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


Endpoint = KVEndpoint | RankedEndpoint


def _counterpart(peer: TransferAddress, rank: int) -> dict[str, Any]:
    return pack_address(peer.ranks[rank - 1])


def _is_failure(result: object) -> bool:
    return result is False or isinstance(result, BaseException)
