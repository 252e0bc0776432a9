"""One rank's end of transfers with workers of any split: a lease's legs as one.

Where a rank has one counterpart a lease is what it is in `KVEndpoint`. Where it has several, each
leg is a lease of its own there, and here they are one again: asked for when all ask, committed
when all are. What is parked is forked into its legs by the first fetch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..engine.layout import KVLayout
from ..engine.request import TransferAddress, WorkerId
from .courses import Courses, Leg
from .endpoint import KVEndpoint
from .events import Asked, Ended, Released, Side, TransferConfig
from .fit import LEG_MASK, Held
from .layer_clock import LayerClock
from .lease_parts import SEVERAL, AskParts, Event, LeaseParts
from .lease_sender import State
from .memory import KVMemory
from .messages import Discard, Grant, Message
from .pair import Pair


class RankEndpoint(KVEndpoint):
    """`KVEndpoint` towards whole workers; `*_legs` for a rank whose leader knows its legs."""

    def __init__(
        self,
        worker: WorkerId,
        layout: KVLayout,
        memory: KVMemory,
        config: TransferConfig,
        held: Held | None = None,
    ) -> None:
        super().__init__(worker, layout, memory, config, held)
        self.courses = Courses(self._held)
        self._parts = LeaseParts(self._events.put_nowait, self.abort, self.discard)
        self._parts_asked = AskParts()
        self.gave_up: Callable[[int], None] = _nobody  # set by whoever gathers the ranks' parts

    async def connect(self, peer: TransferAddress) -> str:
        return await self.connect_to(self.courses.counterparts(peer, self._held.rank))

    async def connect_to(self, addresses: Sequence[TransferAddress]) -> str:
        """The first one's transport. Raises what any raised."""
        calls = [KVEndpoint.connect(self, address) for address in addresses]
        return (await asyncio.gather(*calls))[0]

    def block_size(self, peer: TransferAddress) -> int:
        """Of a connected peer; this worker's own, where it is not connected."""
        for pair in self._board.pairs.values():
            if pair.peer == peer.worker:
                return pair.hello.layout.block_size
        return self._layout.block_size

    def idle(self, peer: WorkerId | None) -> frozenset[int]:
        """Ranks of this worker that send nothing to the worker of a connected peer."""
        for pair in self._board.pairs.values():
            if pair.peer == peer:
                return pair.fit.idle
        return frozenset()

    # Prefill

    async def ask(
        self,
        peer: TransferAddress,
        lease: int,
        num_blocks: int,
        names: bytes = b"",
        num_tokens: int | None = None,
    ) -> bool:
        legs = self.courses.legs(peer, Side.SENDER, self._held.rank)
        return await self.ask_legs(legs, lease, num_blocks, names, num_tokens)

    async def ask_legs(
        self,
        legs: Sequence[Leg],
        lease: int,
        num_blocks: int,
        names: bytes,
        num_tokens: int | None,
    ) -> bool:
        """As `ask`. Where only some legs were granted, the lease has begun and ends."""
        about = (num_blocks, names, num_tokens)
        if _is_one(legs):
            return await KVEndpoint.ask(self, legs[0][1], lease, *about)
        calls = {leg: KVEndpoint.ask(self, address, lease | leg, *about) for leg, address in legs}
        self._parts.open(lease, Side.SENDER, (), calls)
        return await self._parts.begin(lease, Side.SENDER, calls)

    def skipped(self, lease: int) -> int:
        return max(super(RankEndpoint, self).skipped(one) for one in self._ids(lease))

    def push(self, lease: int, blocks: Sequence[int], first: int, ready: LayerClock) -> None:
        for one in self._ids(lease):
            super().push(one, blocks, first, ready)

    def commit(self, lease: int, num_tokens: int, digest: int) -> None:
        for one in self._ids(lease):
            super().commit(one, num_tokens, digest)

    # Decode

    async def grant(
        self,
        peer: TransferAddress,
        lease: int,
        blocks: Sequence[int],
        digest: int,
        skip: int = 0,
    ) -> None:
        legs = self.courses.legs(peer, Side.RECEIVER, self._held.rank)
        await self.grant_legs(legs, lease, blocks, digest, skip, peer)

    async def grant_legs(
        self,
        legs: Sequence[Leg],
        lease: int,
        blocks: Sequence[int],
        digest: int,
        skip: int,
        source: TransferAddress | None = None,
    ) -> None:
        """As `grant`. Where only some legs could, the lease has begun and ends; `source` is told
        that nobody fetches the rest, where no leader does."""
        if _is_one(legs):
            await KVEndpoint.grant(self, legs[0][1], lease, blocks, digest, skip)
            return
        about = (blocks, digest, skip)
        calls = {leg: KVEndpoint.grant(self, address, lease | leg, *about) for leg, address in legs}
        self._parts.open(lease, Side.RECEIVER, blocks, calls).source = source
        await self._parts.begin(lease, Side.RECEIVER, calls)

    def answer(self, asked: Asked, blocks: Sequence[int] | None, skip: int = 0) -> bool:
        """As `KVEndpoint.answer`. A leg whose asker is gone ends the lease."""
        if asked.pair != SEVERAL:
            return super().answer(asked, blocks, skip)
        legs = self._parts_asked.take(asked.lease)
        if not legs:
            return False
        if blocks is not None:
            self._parts.open(asked.lease, Side.RECEIVER, blocks, legs)
        for leg, one in legs.items():
            if not super().answer(one, blocks, skip) and blocks is not None:
                self._parts.never_began(leg, asked.lease, Side.RECEIVER)
        return True

    # Both

    def abort(self, lease: int) -> None:
        for one in {lease, *self._ids(lease), *self._ids(lease, Side.RECEIVER)}:
            super().abort(one)

    def _ids(self, lease: int, side: Side = Side.SENDER) -> list[int]:
        """Under which ids a lease goes here."""
        entry = self._parts.get(lease, side)
        return [lease] if entry is None else [lease | leg for leg in entry.parts]

    def _emit(self, event: Event) -> None:
        leg = event.lease & LEG_MASK
        if not leg:
            self._events.put_nowait(event)
            return
        lease = event.lease - leg
        match event:
            case Asked():
                self._on_leg_asked(leg, lease, event)
            case Ended():
                self._parts.has_ended(leg, lease, event)
            case Released():
                self._parts.is_released(leg, lease)

    def _on_leg_asked(self, leg: int, lease: int, asked: Asked) -> None:
        pair = self._board.pairs[asked.pair]
        num_legs, now_s = len(pair.fit.legs_in), self._loop.time()
        whole = self._parts_asked.add(leg, lease, asked, num_legs, now_s)
        if whole is not None:
            self._events.put_nowait(whole)

    def _on_message(self, pair: Pair, message: Message) -> None:
        if isinstance(message, Grant) and message.lease & LEG_MASK:
            self._fork(message.lease, pair)
        super()._on_message(pair, message)

    def _on_discard(self, message: Discard) -> None:
        """Of the whole worker's lease, as only leaders are told: this rank's part may be over
        while another's waits."""
        for one in self._ids(message.lease):
            super()._on_discard(Discard(one))
        self.gave_up(message.lease)

    def _fork(self, leg: int, pair: Pair) -> None:
        """A leg of something parked is fetched, if it is one."""
        lease, legs = leg & ~LEG_MASK, pair.fit.legs_out
        entry = self._senders.get(lease)
        if entry is None or entry.state is not State.PARKED or leg & LEG_MASK not in legs:
            return
        self._parts.open(lease, Side.SENDER, entry.source, legs)
        self._senders.fork(lease, [lease | one for one in legs])


def _nobody(lease: int) -> None:
    """A worker of one rank has no other part of a lease."""


def _is_one(legs: Sequence[Leg]) -> bool:
    return len(legs) == 1 and legs[0][0] == 0
