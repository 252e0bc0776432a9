"""A follower's end of every KV transfer: its own endpoint, doing what the worker's leader says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..engine.layout import KVLayout
from ..engine.request import WorkerId
from .courses import Leg
from .events import Asked, PeerRefused, PeerUnavailable, TransferConfig
from .fit import LEG_MASK, Held
from .layer_clock import LayerClock, finished_clock
from .memory import KVMemory
from .messages import Grant, Message
from .pair import Life, Pair
from .rank_endpoint import RankEndpoint
from .rank_wire import (
    pack_address,
    pack_event,
    receive,
    send,
    unpack_address,
    unpack_event,
    unpack_legs,
)

EARLY_S = 1.0
_REMEMBERED = 4096  # parked leases; a later grant of these is late, not early
_KEPT_STEPS = 4  # clocks of steps that are over, for pushes on their way


class StepClocks:
    """A clock for every step, whoever speaks of it first: the compute thread or a push."""

    def __init__(self, num_layers: int, mark: Callable[[], Any] | None = None) -> None:
        """`mark` is the endpoint's, see `LayerClock`."""
        self._num_layers, self._mark = num_layers, mark
        self._clocks: dict[int, LayerClock] = {}
        self._over = -1  # this step and all before it are
        self._lock = threading.Lock()

    def begin(self, step: int) -> Callable[[int], None]:
        """The step is about to be computed, all before it are; what to tell its layers to."""
        clock = self.of(step)
        with self._lock:
            self._over = step - _KEPT_STEPS
            for old in [key for key in self._clocks if key <= self._over]:
                del self._clocks[old]
        return clock.finish

    def of(self, step: int) -> LayerClock:
        with self._lock:
            if step <= self._over:
                return finished_clock(self._num_layers)
            return self._clocks.setdefault(step, LayerClock(step, self._mark))


class FollowerEndpoint(RankEndpoint):
    """A follower's own. A peer may fetch what the leader has parked before the leader's word for
    it is here. Such a grant waits for it, up to `EARLY_S`, and so does whatever its pair brings
    behind it: to the protocol a pair's messages come in order, only later."""

    def __init__(
        self,
        worker: WorkerId,
        layout: KVLayout,
        memory: KVMemory,
        config: TransferConfig,
        held: Held,
    ) -> None:
        super().__init__(worker, layout, memory, config, held)
        self._waiting: dict[int, deque[tuple[float, Message]]] = {}  # by pair; since when
        self._parked: dict[int, None] = {}  # what the leader parked lately, the latest last

    def park(self, lease: int, blocks: Sequence[int], num_tokens: int, digest: int) -> None:
        super().park(lease, blocks, num_tokens, digest)
        self._parked[lease] = None
        if len(self._parked) > _REMEMBERED:
            del self._parked[next(iter(self._parked))]
        self._go_on()

    def _on_message(self, pair: Pair, message: Message) -> None:
        if pair.number not in self._waiting and not self._is_early(message):
            super()._on_message(pair, message)
            return
        now_s = self._loop.time()
        self._waiting.setdefault(pair.number, deque()).append((now_s, message))
        self._loop.call_later(EARLY_S, self._go_on, now_s)
        self._go_on()

    def _is_early(self, message: Message) -> bool:
        """Whether it fetches what this rank has not heard of."""
        if not isinstance(message, Grant) or message.attempt:
            return False
        leg, lease = message.lease, message.lease & ~LEG_MASK
        known = lease in self._parked or self._senders.get(lease) is not None
        return not known and self._senders.get(leg) is None

    def _go_on(self, given_up_s: float = 0.0) -> None:
        """Take what waited for no more than it knows now; grants that came until `given_up_s`
        are not waited for any longer."""
        for number, line in list(self._waiting.items()):
            pair = self._board.pairs.get(number)
            while pair is not None and line:
                since_s, message = line[0]
                if pair.life is not Life.OPEN and isinstance(message, Grant):
                    line.popleft()  # its lease ended with the pair
                elif since_s > given_up_s and self._is_early(message):
                    break
                else:
                    line.popleft()
                    super()._on_message(pair, message)
            if pair is None or not line:
                del self._waiting[number]


class RankFollower:
    """One follower's transfers. All methods run on its loop."""

    def __init__(self, endpoint: FollowerEndpoint, clocks: StepClocks) -> None:
        self._endpoint = endpoint
        self._clocks = clocks
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: dict[int, asyncio.Task[None]] = {}  # by lease; asked last
        self._fetches: set[int] = set()  # leases to grant as soon as it is their turn
        self._writer: asyncio.StreamWriter

    async def run(self, address: str, secret: str, rank: int) -> None:
        """Do what the leader at `address` says until its connection ends."""
        own = await self._endpoint.start()
        host, _, port = address.rpartition(":")
        reader, self._writer = await asyncio.open_connection(host, int(port))
        try:
            send(self._writer, [secret, rank, pack_address(own)])
            self._spawn(self._tell_events())
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):  # the leader's end
                while True:
                    number, name, *arguments = await receive(reader)
                    self._do(number, name, arguments)
        finally:
            for task in self._tasks:
                task.cancel()
            await self._endpoint.close()
            self._writer.close()

    def _do(self, number: int, name: str, arguments: list[Any]) -> None:
        endpoint = self._endpoint
        match name, arguments:
            case "connect", [peers]:
                addresses = [unpack_address(peer) for peer in peers]
                self._spawn(self._reply(number, endpoint.connect_to, addresses))
            case "ask", [legs, lease, *about]:
                asked_of = (unpack_legs(legs), lease, *about)
                task = self._spawn(self._reply(number, endpoint.ask_legs, *asked_of))
                self._asks[lease] = task
                task.add_done_callback(lambda _: self._asks.pop(lease, None))
            case "grant", [legs, lease, *about]:
                self._fetches.add(lease)
                self._spawn(self._reply(number, self._grant, unpack_legs(legs), lease, *about))
            case "push", [lease, blocks, first, step]:
                endpoint.push(lease, blocks, first, self._clocks.of(step))
            case "answer", [[kind, asked], blocks, skip]:
                event = unpack_event(kind, asked)
                assert isinstance(event, Asked)
                if not endpoint.answer(event, blocks, skip) and blocks is not None:
                    send(self._writer, ["unanswered", event.lease])
            case "commit", [lease, num_tokens, digest]:
                endpoint.commit(lease, num_tokens, digest)
            case "park", [lease, blocks, num_tokens, digest]:
                endpoint.park(lease, blocks, num_tokens, digest)
            case "abort", [lease]:
                if (asking := self._asks.get(lease)) is not None:
                    asking.cancel()
                self._fetches.discard(lease)
                endpoint.abort(lease)
            case _:
                raise AssertionError(f"{name} is no command of this version")

    async def _grant(self, legs: list[Leg], lease: int, *about: Any) -> None:
        """As the endpoint does; the leader may have ceased to wait for the reply."""
        try:
            if lease not in self._fetches:
                raise PeerUnavailable(f"lease {lease} was given up")
            self._fetches.discard(lease)
            await self._endpoint.grant_legs(legs, lease, *about)
        except (PeerUnavailable, PeerRefused):
            send(self._writer, ["not fetched", lease])
            raise

    async def _reply(
        self, number: int, call: Callable[..., Awaitable[object]], *arguments: Any
    ) -> None:
        try:
            send(self._writer, ["reply", number, await call(*arguments), ""])
        except PeerUnavailable as error:
            send(self._writer, ["reply", number, "unavailable", error.reason])
        except PeerRefused as error:
            send(self._writer, ["reply", number, "refused", str(error)])

    async def _tell_events(self) -> None:
        async for event in self._endpoint.events():
            send(self._writer, ["event", *pack_event(event)])

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
