"""A worker's heart: beats to its peers, notices silence, and lets leases run out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from .events import TransferConfig
from .lease import Action
from .lease_receiver import ReceiverTable
from .lease_sender import SenderTable
from .messages import Beat
from .pair import Life, Pair
from .switchboard import Switchboard


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
        """For ever; four beats in the time after which a peer is lost."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._config.silence_s / 4)
            now_s = loop.time()
            for pair in list(self._board.pairs.values()):
                if pair.life is Life.OPEN:
                    self._beat(pair, now_s)
            self._perform(self._senders.expire(now_s))
            self._perform(self._receivers.expire(now_s))

    def _beat(self, pair: Pair, now_s: float) -> None:
        moved, pair.copier.moved = pair.copier.moved, set()
        for lease in moved:
            self._senders.touch(lease, now_s)
        if now_s - pair.heard_s > self._config.silence_s:
            self._board.fault(pair, f"silent for {now_s - pair.heard_s:.1f} s")
            return
        number = pair.number
        beat = Beat(
            self._senders.live(number), self._receivers.live(number), self._senders.seen(number)
        )
        self._board.send(pair, beat)
