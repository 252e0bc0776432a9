"""Word to peers that nobody will fetch what they parked, given until they have taken it.

No other message outlives its pair: a lease that was granted ends with the pair on both sides, but
what is parked belongs to none. Where a pair breaks before its peer has answered, or cannot be made
at all, the next one brings the word again, for as long as anything may be parked.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ..engine.request import TransferAddress, WorkerId
from .events import Ended, Outcome, PeerRefused, PeerUnavailable, TransferConfig
from .messages import Discard
from .switchboard import Switchboard

RETRY_S = 0.1  # the least between two tries to reach a peer


@dataclass(slots=True)
class _Debt:
    """What one peer has not taken yet."""

    until_s: dict[int, float] = field(default_factory=dict)  # by lease; expired there by then
    told: set[int] = field(default_factory=set)  # of these, by the pair `number`
    number: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Discards:
    """All that one endpoint owes. Runs on its loop."""

    def __init__(self, board: Switchboard, config: TransferConfig) -> None:
        self._board, self._config = board, config
        self._debts: dict[WorkerId, _Debt] = {}
        self._fetched: dict[int, TransferAddress] = {}  # by lease; until it ends
        self._closed = False

    def fetching(self, peer: TransferAddress, lease: int) -> None:
        """It was granted what waits there."""
        self._fetched[lease] = peer

    def fetch_ended(self, ended: Ended) -> None:
        """A receiver's lease is over. Where its grant was lost on the way the KV waits still."""
        peer = self._fetched.pop(ended.lease, None)
        if peer is not None and ended.outcome is not Outcome.COMMITTED:
            self.add(peer, ended.lease)

    def add(self, peer: TransferAddress, lease: int) -> None:
        """Told at once where the peer is connected, and as soon as it is otherwise."""
        if self._closed:  # what a closing worker leaves expires by itself
            return
        loop = asyncio.get_running_loop()
        debt = self._debts.get(peer.worker)
        if debt is None:
            debt = self._debts[peer.worker] = _Debt()
            debt.task = loop.create_task(self._deliver(peer, debt))
        debt.until_s[lease] = loop.time() + self._config.park_s
        debt.told.discard(lease)
        debt.changed.set()

    def taken(self, peer: WorkerId, lease: int) -> None:
        """The peer has heard of this one."""
        debt = self._debts.get(peer)
        if debt is not None and debt.until_s.pop(lease, None) is not None and not debt.until_s:
            debt.changed.set()

    def pair_lost(self, peer: WorkerId) -> None:
        """What was told by it may not have been read."""
        if (debt := self._debts.get(peer)) is not None:
            debt.changed.set()

    async def close(self) -> None:
        self._closed = True
        tasks = [debt.task for debt in self._debts.values() if debt.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self, peer: TransferAddress, debt: _Debt) -> None:
        """Until nothing is owed, or this incarnation will never take it."""
        try:
            while self._is_owed(debt):
                try:
                    await self._tell(peer, debt)
                except PeerUnavailable as error:
                    await asyncio.sleep(max(error.retry_after_s, RETRY_S))
        except PeerRefused:
            self._board.counters["discard not delivered"] += len(debt.until_s)
        finally:
            del self._debts[peer.worker]

    async def _tell(self, peer: TransferAddress, debt: _Debt) -> None:
        """All that the peer has not heard by the pair as it stands; then wait for more, or for
        the time after which it should have answered."""
        debt.changed.clear()
        pair = await self._board.reach(peer)
        if pair.number != debt.number:
            debt.number, debt.told = pair.number, set()
        for lease in debt.until_s.keys() - debt.told:
            debt.told.add(lease)
            self._board.send(pair, Discard(lease))
        try:
            async with asyncio.timeout(self._config.answer_s):
                await debt.changed.wait()
        except TimeoutError:
            debt.told.clear()

    def _is_owed(self, debt: _Debt) -> bool:
        now_s = asyncio.get_running_loop().time()
        expired = [lease for lease, until_s in debt.until_s.items() if until_s <= now_s]
        for lease in expired:
            del debt.until_s[lease]
        self._board.counters["discard not delivered"] += len(expired)
        return bool(debt.until_s)
