"""A worker's end of every KV transfer.

Joins the pure lease tables to connections and copiers. It promises what `lease` and `events`
say and knows nothing of requests, schedulers or models: ids, blocks and digests go in and out.
All methods run on the worker's loop and none blocks it.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from ..engine.layout import KVLayout
from ..engine.request import TransferAddress, WorkerId
from .copier import Cancel
from .digest import checksum_of
from .discards import Discards
from .events import (
    Asked,
    Ended,
    Outcome,
    PairStatus,
    PeerUnavailable,
    Released,
    Side,
    TransferConfig,
)
from .fit import LEG_BITS, Held, whole
from .heart import Heart
from .layer_clock import LayerClock
from .lease import Action, Answered, Send, Start, Stop, Verify
from .lease_messages import heard
from .lease_receiver import ReceiverTable
from .lease_sender import SenderTable
from .memory import KVMemory
from .messages import Discard, Discarded, Message
from .outgoing import Outgoing
from .pair import Life, Pair
from .switchboard import Copied, Gone, Heard, Notice, Switchboard, Took

_CLOSE_S = 1.0  # longest wait for peers when closing
_LOW = (1 << 32) - 1


class KVEndpoint:
    """One a worker: sends KV out of its pool and receives KV into it."""

    def __init__(
        self,
        worker: WorkerId,
        layout: KVLayout,
        memory: KVMemory,
        config: TransferConfig,
        held: Held | None = None,
    ) -> None:
        """`held`: what the ranks of its worker hold; None for a worker of one."""
        assert memory.num_bytes == layout.num_bytes, "the pool is what the layout says"
        self.worker, self._layout, self._memory, self._config = worker, layout, memory, config
        self._senders = SenderTable(
            num_layers=layout.num_layers, lease_s=config.lease_s, park_s=config.park_s
        )
        self._receivers = ReceiverTable(
            num_layers=layout.num_layers, block_bytes=layout.block_bytes, lease_s=config.lease_s
        )
        self._held = held or whole(layout)
        self._board = Switchboard(
            worker, self._held, memory, config, self._receivers, self._on_notice
        )
        self._heart = Heart(config, self._senders, self._receivers, self._board, self._perform)
        self._numbers = itertools.count(1)
        self._asks: dict[int, asyncio.Future[bool]] = {}
        self._calling: set[int] = set()  # leases to fetch, whose peer is not reached yet
        self._outgoing = Outgoing(layout, memory, config, self._senders, self._board)
        self._discards = Discards(self._board, config)
        self._events: asyncio.Queue[Asked | Ended | Released | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False
        self._due: deque[Action | Asked] = deque()
        self._is_performing = False

    async def start(self) -> TransferAddress:
        """Listen; the address is for peers."""
        self._loop = asyncio.get_running_loop()
        address = self._board.listen()
        self._ticker = self._loop.create_task(self._heart.run())
        return address

    @property
    def mark(self) -> Callable[[], Any] | None:
        """For the `LayerClock` of a step that fills this pool."""
        return self._memory.mark

    async def connect(self, peer: TransferAddress) -> str:
        """Meet a peer before the first request; the transport chosen.

        Raises PeerRefused where it can never work (another layout, model or incarnation),
        PeerUnavailable where a later try may.
        """
        return (await self._board.reach(peer)).transport

    def new_lease(self) -> int:
        """An id (uint64) of this incarnation's own, for `ask` and `park`. Its last `LEG_BITS`
        are zero, and it comes again after 2^24 leases."""
        number = next(self._numbers) << LEG_BITS & _LOW
        return zlib.crc32(str(self.worker).encode()) << 32 | number

    # Prefill

    async def ask(
        self,
        peer: TransferAddress,
        lease: int,
        num_blocks: int,
        names: bytes = b"",
        num_tokens: int | None = None,
    ) -> bool:
        """Ask a decode worker for room for `num_blocks` of these blocks. `names` tell it which of
        its first it may hold already; `skipped` then says how many of these it does, and the
        lease is about the rest. `num_tokens`: of the KV, if it does not fill its last block.

        True: granted, and exactly one Ended follows. False: no room, or no answer within
        `answer_s`; the lease has not begun, and may be parked. Raises as `connect`.
        """
        pair = await self._board.reach(peer)
        answer: asyncio.Future[bool] = self._loop.create_future()
        self._asks[lease] = answer
        if num_tokens is None:
            num_tokens = num_blocks * self._layout.block_size
        try:
            now_s, extent = self._loop.time(), pair.fit.out.extent
            about = (pair.number, pair.peer, lease, num_blocks, now_s, names, num_tokens, extent)
            self._perform(self._senders.ask(*about))
            await asyncio.wait([answer], timeout=self._config.answer_s)
            if answer.done():  # be it that its time is up as well, on a loop that was held up
                return answer.result()
            self._board.counters["ask not answered"] += 1
            return False
        except asyncio.CancelledError:
            self.abort(lease)  # it may be granted already
            raise
        finally:
            self._asks.pop(lease, None)
            self._perform(self._senders.withdraw(lease))  # of no effect once answered

    def skipped(self, lease: int) -> int:
        """Leading blocks of a granted lease that its receiver holds already; never pushed."""
        entry = self._senders.get(lease)
        return 0 if entry is None else entry.skip

    def push(self, lease: int, blocks: Sequence[int], first: int, ready: LayerClock) -> None:
        """Send `blocks` of this pool as the lease's blocks `[first, first + len(blocks))`.

        Call it when the step that computes them starts; each layer goes as `ready` tells.
        Chunks come in order; a boundary block may be pushed again, by the chunk that fills it.
        After the lease ended nothing happens: its Ended is on the way.
        """
        self._check(blocks)
        entry = self._senders.push(lease, list(blocks), first, self._loop.time())
        if entry is None:
            return
        self._outgoing.push(entry, first, len(blocks), ready)

    def commit(self, lease: int, num_tokens: int, digest: int) -> None:
        """All is pushed: after the last `push`, best when its step is over.

        `digest` is `token_digest` of the tokens whose KV this is.
        """
        entry = self._senders.push(lease, [], 0, self._loop.time())
        if entry is None:
            return
        entry.num_tokens, entry.digest = num_tokens, digest
        if self._outgoing.has_failed(lease):
            self._perform(self._senders.abort(lease, Outcome.ABORTED, "a step failed"))
        else:
            self._outgoing.commit(entry)

    def park(self, lease: int, blocks: Sequence[int], num_tokens: int, digest: int) -> None:
        """KV that stands complete in this pool waits for a grant; exactly one Ended follows."""
        self._check(blocks)
        self._senders.park(lease, list(blocks), num_tokens, digest, self._loop.time())

    # Decode

    async def grant(
        self,
        peer: TransferAddress,
        lease: int,
        blocks: Sequence[int],
        digest: int,
        skip: int = 0,
    ) -> None:
        """Fetch parked KV into `blocks`, all but its first `skip` blocks. `digest`:
        `token_digest` of all the tokens expected.

        Exactly one Ended follows; aborted if the peer does not hold the lease. What fails is
        discarded. Raises as `connect`, and then the blocks are still the caller's.
        """
        self._check(blocks)
        self._calling.add(lease)
        try:
            pair = await self._board.reach(peer)
            if lease not in self._calling:
                raise PeerUnavailable(f"lease {lease} was given up")
        finally:
            self._calling.discard(lease)
        if self._receivers.get(lease) is not None:
            raise PeerUnavailable(f"lease {lease} is still being revoked here")
        self._discards.fetching(peer, lease)
        writes_here, extent = pair.reader is not None, pair.fit.into.extent
        now_s, about = self._loop.time(), (lease, tuple(blocks), digest, writes_here)
        self._perform(self._receivers.fetch(pair.number, pair.peer, *about, now_s, skip, extent))

    def answer(self, asked: Asked, blocks: Sequence[int] | None, skip: int = 0) -> bool:
        """Grant `asked.num_blocks - skip` blocks, or None for no room. The first `skip` are here.

        True with blocks: they are leased and exactly one Ended follows. False: the asker is
        gone and the blocks are still the caller's.
        """
        pair = self._board.pairs.get(asked.pair)
        if pair is None or pair.life is not Life.OPEN:
            return False
        self._check(blocks or ())
        target = None if blocks is None else tuple(blocks)
        now_s, extent = self._loop.time(), pair.fit.into.extent
        writes_here = pair.reader is not None
        actions = self._receivers.answer(asked, target, writes_here, now_s, skip, extent)
        self._perform(actions or [])
        if actions and target is not None:
            self._board.look_out(pair)
        return actions is not None

    def discard(self, peer: TransferAddress, lease: int) -> None:
        """Nobody will fetch what `peer` parked under `lease`: its blocks may be free at once.

        Of no effect on a lease that was granted. A peer that cannot be reached hears it later.
        """
        self._discards.add(peer, lease)

    # Both

    def abort(self, lease: int) -> None:
        """Give a lease up, on whichever side this is; unknown or ended ones are ignored. A `grant`
        that has not reached its peer yet raises PeerUnavailable."""
        self._calling.discard(lease)
        reason = f"aborted by {self.worker}"
        self._perform(self._senders.abort(lease, Outcome.ABORTED, reason))
        self._perform(self._receivers.abort(lease, Outcome.ABORTED, reason))

    async def events(self) -> AsyncIterator[Asked | Ended | Released]:
        """What happens, in order; ends when the endpoint is closed. For one reader."""
        while (event := await self._events.get()) is not None:
            yield event

    def pairs(self) -> tuple[PairStatus, ...]:
        """The peers as they stand."""
        senders, receivers = self._senders, self._receivers
        return tuple(
            pair.status(
                live_leases=len(senders.on_pair(number)) + len(receivers.on_pair(number)),
                quarantined_blocks=receivers.quarantined(number),
            )
            for number, pair in self._board.pairs.items()
        )

    def counters(self) -> dict[str, int]:
        """How often messages were refused and connections failed, by name, since the start."""
        return dict(self._senders.refused + self._receivers.refused + self._board.counters)

    async def close(self) -> None:
        """End live leases as aborted and let go of every thread, socket and mapping."""
        if self._closed:
            return
        self._closed = True
        for lease in {*self._senders.leases(), *self._receivers.leases()}:
            self.abort(lease)
        await self._discards.close()
        await self._board.close(_CLOSE_S)
        for task in filter(None, (self._ticker, *self._tasks)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._events.put_nowait(None)

    # What happens

    def _on_notice(self, notice: Notice) -> None:
        match notice:
            case Heard(pair, message):
                self._on_message(pair, message)
            case Took(actions):
                self._perform(actions)
            case Gone(pair, reason):
                drained = pair.peer_is_out
                self._perform(self._receivers.lost(pair.number, reason, drained=drained))
                self._perform(self._senders.lost(pair.number, reason))
                self._discards.pair_lost(pair.peer)
            case Copied(pair, what, lease, checksum):
                self._on_copied(pair, what, lease, checksum)

    def _on_message(self, pair: Pair, message: Message) -> None:
        match message:
            case Discard():
                self._on_discard(message)
                self._board.send(pair, Discarded(message.lease))
            case Discarded(lease):
                self._discards.taken(pair.peer, lease)
            case _:
                now_s, tables = self._loop.time(), (self._senders, self._receivers)
                self._perform(heard(pair, message, *tables, now_s))

    def _on_discard(self, message: Discard) -> None:
        self._perform(self._senders.on_discard(message))

    def _on_copied(self, pair: Pair, what: str, lease: int, checksum: int | None) -> None:
        if what == "finished":
            self._outgoing.finished(pair, lease, checksum)
        elif what == "failed":
            self._perform(self._senders.abort(lease, Outcome.ABORTED, "the step failed"))
        elif what == "drained":
            self._perform(self._senders.drained(lease))
        else:  # the thread is over: it is out of everything
            for entry in self._senders.on_pair(pair.number):
                self._perform(self._senders.drained(entry.lease))

    def _perform(self, actions: Sequence[Action | Asked]) -> None:
        """In order: what an action brings about (a send may find its pair broken) comes behind
        those that are due already, or a lease would be released before it has ended."""
        self._due += actions
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._due:
                self._do(self._due.popleft())
        finally:
            self._is_performing = False

    def _do(self, action: Action | Asked) -> None:
        match action:
            case Send(number, message):
                if (pair := self._board.pairs.get(number)) is not None:
                    self._board.send(pair, message)
            case Answered(lease, granted):
                if (future := self._asks.get(lease)) is not None and not future.done():
                    future.set_result(granted)
            case Start(lease):
                self._outgoing.send_parked(lease)
            case Stop(number, lease):
                self._stop(number, lease)
            case Verify():
                self._spawn(self._verify(action))
            case Ended():
                self._note(action)
                self._emit(action)
            case Asked() | Released():
                self._emit(action)

    def _emit(self, event: Asked | Ended | Released) -> None:
        self._events.put_nowait(event)

    def _stop(self, number: int, lease: int) -> None:
        """Get the copier out of a lease; on a dying pair its thread's end says so for all."""
        pair = self._board.pairs.get(number)
        if pair is None or pair.copier_is_out:
            self._perform(self._senders.drained(lease))
        elif pair.life is Life.OPEN:
            pair.copier.submit(Cancel(lease))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _verify(self, action: Verify) -> None:
        """Off the loop: it reads every byte."""
        pair = self._board.pairs.get(action.pair)
        if pair is None:  # it ended, and the lease with it
            return
        total = await asyncio.to_thread(checksum_of, self._memory, pair.fit.into, action.units)
        equal = total == action.checksum
        now_s = self._loop.time()
        self._perform(self._receivers.verified(action.lease, action.generation, equal, now_s))

    def _check(self, blocks: Sequence[int]) -> None:
        inside = all(0 <= block < self._layout.num_blocks for block in blocks)
        assert inside, "block ids are of this worker's pool"

    def _note(self, ended: Ended) -> None:
        if ended.side is Side.SENDER:
            self._outgoing.forget(ended.lease)
        else:
            self._discards.fetch_ended(ended)
        for pair in self._board.pairs.values():
            if pair.peer == ended.peer and pair.life is not Life.CLOSED:
                pair.note(ended)
                return
