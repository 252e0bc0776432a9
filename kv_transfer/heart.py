"""A worker's heart: beats to its peers, notices silence, and lets leases run out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from .events import TransferConfig
from .lease import Action
from .lease_receiver import ReceiverTable
from .lease_sender import SenderTable
from .messages import Beat
from .pair import Life, Pair
from .switchboard import Switchboard

BEATS = 4  # in the time after which a peer is lost
PATIENCE = 0.95  # of `silence_s`, so that the leases of a lost peer have ended within it


class Heart:
    """`perform` takes what the tables want done."""

    def __init__(
        self,
        config: TransferConfig,
        senders: SenderTable,
        receivers: ReceiverTable,
        board: Switchboard,
        perform: Callable[[Sequence[Action]], None],
    ) -> None:
        self._config, self._board, self._perform = config, board, perform
        self._senders, self._receivers = senders, receivers

    async def run(self) -> None:
        """For ever. A peer is lost when its time is up, not at the beat after that; what it said
        while this loop was held up is heard first, as sockets come before timers."""
        loop = asyncio.get_running_loop()
        while True:
            beat_s = loop.time() + self._config.silence_s / BEATS
            while (now_s := loop.time()) < beat_s:
                await asyncio.sleep(min(beat_s, self._next_loss_s()) - now_s)
                self._lose_silent(loop.time())
            for pair in self._open_pairs():
                self._beat(pair, now_s)
            self._perform(self._senders.expire(now_s))
            self._perform(self._receivers.expire(now_s))

    def _open_pairs(self) -> list[Pair]:
        return [pair for pair in self._board.pairs.values() if pair.life is Life.OPEN]

    def _next_loss_s(self) -> float:
        """When the first peer is lost that says nothing from now on."""
        heard_s = min((pair.heard_s for pair in self._open_pairs()), default=math.inf)
        return heard_s + PATIENCE * self._config.silence_s

    def _lose_silent(self, now_s: float) -> None:
        for pair in self._open_pairs():
            silent_s = now_s - pair.heard_s
            if silent_s >= PATIENCE * self._config.silence_s:
                self._board.fault(pair, f"silent for {silent_s:.1f} s")

    def _beat(self, pair: Pair, now_s: float) -> None:
        moved, pair.copier.moved = pair.copier.moved, set()
        for lease in moved:
            self._senders.touch(lease, now_s)
        number = pair.number
        beat = Beat(
            self._senders.live(number), self._receivers.live(number), self._senders.seen(number)
        )
        self._board.send(pair, beat)
