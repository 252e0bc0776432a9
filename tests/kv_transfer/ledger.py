"""What a worker of the tests knows of its leases, and the laws that it holds them to."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
from phasewise.kv_transfer.events import Asked, Ended, Outcome, Released, Side

from .harness import LAYOUT, Here

FREE = 0xEE  # what stands in a block that nobody may write


class Ledger:
    """Of the worker here. As receiver it answers every ask; a lease is counted from its grant."""

    def __init__(self, worker: Here) -> None:
        self.worker = worker
        self.free = set(range(LAYOUT.num_blocks))
        self.held: dict[int, tuple[int, ...]] = {}  # of leases into this pool
        self.sent: dict[int, np.ndarray] = {}  # what their senders mean to put there
        self.begun: Counter[tuple[Side, int]] = Counter()
        self.ended: Counter[tuple[Side, int]] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.committed: set[int] = set()

    def receives(self) -> None:
        """Its pool is for others' KV only."""
        self.worker.pool[:] = FREE

    async def watch(self) -> None:
        async for event in self.worker.stream:
            match event:
                case Asked():
                    self._answer(event)
                case Released():
                    assert self.held.pop(event.lease) == event.blocks, "released once, and all"
                    self.give_back(event.blocks)
                case Ended():
                    self._end(event)

    def take(self, count: int) -> tuple[int, ...]:
        blocks = tuple(sorted(self.free)[:count])
        assert len(blocks) == count, "the test wants more than there is"
        self.free -= set(blocks)
        untouched = (self.worker.pool[:, list(blocks)] == FREE).all()
        assert untouched, "law 4: a free block was written"
        return blocks

    def give_back(self, blocks: tuple[int, ...]) -> None:
        self.worker.pool[:, list(blocks)] = FREE
        self.free |= set(blocks)

    def hold(self, lease: int, blocks: tuple[int, ...]) -> None:
        self.held[lease] = blocks
        self.begun[Side.RECEIVER, lease] += 1

    def _answer(self, asked: Asked) -> None:
        blocks = self.take(min(asked.num_blocks, len(self.free)))
        if len(blocks) == asked.num_blocks and self.worker.endpoint.answer(asked, blocks):
            self.hold(asked.lease, blocks)
        else:
            self.give_back(blocks)

    def _end(self, ended: Ended) -> None:
        self.ended[ended.side, ended.lease] += 1
        self.outcomes[ended.outcome] += 1
        assert self.ended[ended.side, ended.lease] == 1, "law 3: a lease ends once"
        if ended.side is Side.RECEIVER and ended.outcome is Outcome.COMMITTED:
            blocks = self.held.pop(ended.lease)
            assert blocks == ended.blocks
            arrived = self.worker.pool[:, list(blocks)]
            assert np.array_equal(arrived, self.sent[ended.lease]), "wrong KV was committed"
            self.give_back(blocks)
            self.committed.add(ended.lease)

    def is_settled(self, lease: int) -> bool:
        """Whether whatever began of it has ended here, and its blocks are back."""
        sides = ((side, lease) for side in Side)
        return lease not in self.held and all(self.begun[s] == self.ended[s] for s in sides)

    async def settled(self, lease: int, within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not self.is_settled(lease):
                await asyncio.sleep(0.005)
