"""The pairs of one worker: made, kept alive, and let go only when nobody can write any more.

It reports by `Notice`s, drained with `notices`; what they mean for leases is the endpoint's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.request import TransferAddress, WorkerId
from .breaker import Breaker
from .caller import Caller, host_id
from .contact import Contact, drop_contact
from .copier import Copier
from .events import PeerRefused, PeerUnavailable, TransferConfig
from .fit import Held
from .lease import Action
from .lease_receiver import ReceiverTable
from .memory import CANARY_SLOT_BYTES, KVMemory
from .messages import Abort, Bye, Canary, LostFraming, MalformedFrame, Message, Ready
from .paced import Lane, PacedWriter
from .pair import Life, Pair
from .transports import Transports
from .ways import ways_to


@dataclass(frozen=True, slots=True)
class Heard:
    """A lease message from an open pair, or a dying one's last words."""

    pair: Pair
    message: Message


@dataclass(frozen=True, slots=True)
class Took:
    """The data connection moved leases on."""

    actions: list[Action]


@dataclass(frozen=True, slots=True)
class Gone:
    """A pair is not to be used any more. Again, with `pair.peer_is_out`, once more is known."""

    pair: Pair
    reason: str


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copier had to say; see `Copier`. "closed" and "broken" are its last words."""

    pair: Pair
    what: str
    lease: int
    checksum: int | None


Notice = Heard | Took | Gone | Copied


class Switchboard:
    """Owned by the endpoint, on its loop. `notify` takes each notice as it comes."""

    def __init__(
        self,
        worker: WorkerId,
        held: Held,
        memory: KVMemory,
        config: TransferConfig,
        table: ReceiverTable,
        notify: Callable[[Notice], None],
    ) -> None:
        self._memory, self._config = memory, config
        self._table, self._notify = table, notify
        self._caller = Caller(worker, held, memory, config)
        self._transports = Transports(
            held.own.layout, memory, table, lambda done: notify(Took(done))
        )
        self._lane = Lane(config.pace_bytes_per_s) if config.pace_bytes_per_s else None
        self._calls: dict[WorkerId, asyncio.Task[Pair]] = {}
        self._breakers: dict[WorkerId, Breaker] = {}
        self._greeter: asyncio.Task[None] | None = None
        self.pairs: dict[int, Pair] = {}
        self.counters = self._caller.counters

    def listen(self) -> TransferAddress:
        self._loop = asyncio.get_running_loop()
        address = self._caller.listen()
        self._greeter = self._loop.create_task(self._greet())
        return address

    async def reach(self, peer: TransferAddress) -> Pair:
        """An open, proven pair with the peer. Raises PeerRefused, PeerUnavailable."""
        for pair in self.pairs.values():
            if pair.peer == peer.worker and pair.is_ready:
                return pair
        call = self._calls.get(peer.worker)
        if call is None:
            call = self._loop.create_task(self._call(peer))
            self._calls[peer.worker] = call
            call.add_done_callback(lambda _: self._calls.pop(peer.worker, None))
        return await asyncio.shield(call)

    def send(self, pair: Pair, message: Message) -> None:
        """Nothing is sent on a closed pair: its leases have ended already."""
        if pair.life is Life.CLOSED:
            return
        try:
            if pair.write(message):
                self._loop.add_writer(pair.sock, self._flush, pair)
        except OSError as error:
            self._loop.remove_writer(pair.sock)
            self.fault(pair, f"cannot send: {error}")

    def look_out(self, pair: Pair) -> None:
        """The peer is about to answer what was just sent: see `Vigil`."""
        if (until_s := pair.vigil.begin(self._loop.time())) is not None:
            self._loop.call_soon(self._look_out, pair, until_s)

    def fault(self, pair: Pair, reason: str) -> None:
        """Use the pair no more. It is closed when both sides' copiers are out."""
        if pair.life is not Life.OPEN:
            return
        pair.life = Life.DYING
        self.counters["pair lost"] += 1
        pair.peer_is_out = pair.peer_is_out or pair.pidfd < 0 or pair.process_is_dead()
        if not pair.ready.done():
            pair.ready.set_exception(PeerUnavailable(f"{pair.peer}: {reason}"))
            pair.ready.exception()  # seen, even if nobody waits
        if pair.data is not None:
            self._loop.remove_reader(pair.data)
            with contextlib.suppress(OSError):
                pair.data.shutdown(socket.SHUT_RDWR)
        if pair.reader is not None:
            pair.reader.close()
        pair.copier_is_out = pair.writer.leave()
        pair.copier.close()
        self._notify(Gone(pair, reason))
        self.settle(pair)

    def settle(self, pair: Pair) -> None:
        """Close a dying pair once our copier is out, and the peer's is where it matters."""
        if pair.life is not Life.DYING or not pair.copier_is_out:
            return
        if self._table.on_pair(pair.number) and not pair.peer_is_out:
            return
        pair.life = Life.CLOSED
        for sock in filter(None, (pair.sock, pair.data)):
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
        if pair.pidfd >= 0:
            self._loop.remove_reader(pair.pidfd)
        pair.release()
        del self.pairs[pair.number]

    async def close(self, grace_s: float) -> None:
        """Close every pair; those whose writer hangs are cut off after `grace_s`."""
        await self._caller.close()
        for task in filter(None, (self._greeter, *self._calls.values())):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        while self._caller.contacts:
            drop_contact(self._caller.contacts.popleft())
        for pair in list(self.pairs.values()):
            self.fault(pair, "this worker closes")
        until_s = self._loop.time() + grace_s
        while self.pairs and self._loop.time() < until_s:
            await asyncio.sleep(0.005)
        for pair in list(self.pairs.values()):
            pair.peer_is_out = pair.copier_is_out = True  # this pool goes; nothing is reused
            self.settle(pair)

    async def _greet(self) -> None:
        """Open a pair for every call that was answered."""
        while True:
            await self._caller.answered.wait()
            self._caller.answered.clear()
            while self._caller.contacts:
                self._open(self._caller.contacts.popleft())

    async def _call(self, peer: TransferAddress) -> Pair:
        breaker = self._breakers.setdefault(peer.worker, Breaker())
        if wait_s := breaker.wait_s(self._loop.time()):
            self.counters["breaker open"] += 1
            raise PeerUnavailable(
                f"{peer.worker} failed {breaker.failures} times", retry_after_s=wait_s
            )
        try:
            pair = self._open(await self._dial(peer))
            if not await pair.proven(self._config.answer_s):
                self.fault(pair, "its canary did not come in time")
                raise TimeoutError("its canary did not come in time")
        except PeerRefused:
            raise
        except (OSError, TimeoutError, PeerUnavailable, ValueError) as error:
            breaker.failed(self._loop.time())
            self.counters["call failed"] += 1
            if isinstance(error, PeerUnavailable):
                raise
            reason = str(error) or type(error).__name__
            raise PeerUnavailable(f"{peer.worker} cannot be reached: {reason}") from error
        breaker.succeeded()
        return pair

    async def _dial(self, peer: TransferAddress) -> Contact:
        """By the best transport that both allow and that reaches the peer."""
        ways = ways_to(peer, self._caller.ways, host_id())
        if not ways:
            raise PeerRefused(
                f"{peer.worker} offers no transport that {self._config.transport!r} allows; "
                "set transfer.transport alike on both sides"
            )
        for way, other in itertools.pairwise(ways):
            try:
                return await self._caller.dial(peer, way)
            except OSError:
                self.counters[f"{way} not reachable, {other} used"] += 1
        return await self._caller.dial(peer, ways[-1])

    def _open(self, contact: Contact) -> Pair:
        for other in list(self.pairs.values()):
            newer = contact.hello.worker.incarnation > other.peer.incarnation
            if other.peer.name == contact.hello.worker.name and newer:
                self.fault(other, "replaced by a newer incarnation")
        pair = self._make(contact)
        self.pairs[pair.number] = pair
        self._loop.add_reader(pair.sock, self._on_control, pair)
        if pair.data is not None:
            self._loop.add_reader(pair.data, self._on_data, pair)
        if pair.pidfd >= 0:
            self._loop.add_reader(pair.pidfd, self._on_death, pair)
        self._prove(pair)
        if contact.rest:
            pair.inbox += contact.rest
            self._loop.call_soon(self._on_control, pair)
        return pair

    def _make(self, contact: Contact) -> Pair:
        writer, reader = self._transports.join(contact, self._broke)
        out = contact.fit.out.mine
        if self._lane is not None:
            writer = PacedWriter(writer, self._lane, out.unit_bytes)

        def tell(what: str, lease: int, checksum: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without `close`
                self._loop.call_soon_threadsafe(self._on_copier, pair, what, lease, checksum)

        pair = Pair(
            number=contact.number,
            hello=contact.hello,
            fit=contact.fit,
            sock=contact.sock,
            data=contact.data,
            pidfd=contact.pidfd,
            writer=writer,
            copier=Copier(writer, out, tell),
            reader=reader,
            pattern=secrets.token_bytes(CANARY_SLOT_BYTES),
            heard_s=self._loop.time(),
            ready=self._loop.create_future(),
        )
        return pair

    def _broke(self, number: int, reason: str) -> None:
        if (pair := self.pairs.get(number)) is not None:
            self.fault(pair, reason)

    def _prove(self, pair: Pair) -> None:
        """Write a canary where the peer looks for it, and say so."""
        try:
            pair.writer.write_canary(pair.hello.canary_slot, pair.pattern)
        except OSError as error:
            self.fault(pair, f"canary: {error}")
            return
        self.send(pair, Canary(pair.pattern))

    def _look(self, pair: Pair) -> None:
        """Answer the peer's canary once it stands here."""
        if pair.expected is None or pair.answered:
            return
        if not self._memory.holds_canary(pair.number, pair.expected):
            return
        pair.answered = True
        self.send(pair, Ready(pair.expected))
        self._become_ready(pair)

    def _become_ready(self, pair: Pair) -> None:
        if pair.is_ready and not pair.ready.done():
            pair.ready.set_result(None)

    def _look_out(self, pair: Pair, until_s: float) -> None:
        while pair.life is Life.OPEN and (ready := pair.wait_for_word(until_s)):
            if pair.data is not None and pair.data.fileno() in ready:
                self._on_data(pair)
            if pair.sock.fileno() in ready:
                self._on_control(pair)
                return

    def _on_control(self, pair: Pair) -> None:
        if pair.life is Life.CLOSED:
            return
        try:
            messages = pair.read()
        except MalformedFrame as error:
            self._on_babble(pair, error)
            return
        except OSError as error:
            self._loop.remove_reader(pair.sock)
            self.fault(pair, str(error))
            self._learn(pair)
            return
        pair.heard(self._loop.time())
        try:
            for message in messages:
                self._on_message(pair, message)
        except MalformedFrame as error:  # well formed, but what it says cannot be
            self._on_babble(pair, error)

    def _on_babble(self, pair: Pair, error: MalformedFrame) -> None:
        """The pair is given up, but read on, where that can be, until the peer is out."""
        self.counters["malformed"] += 1
        if isinstance(error, LostFraming):
            self._loop.remove_reader(pair.sock)
        else:
            self._loop.call_soon(self._on_control, pair)
        self.fault(pair, str(error))

    def _on_message(self, pair: Pair, message: Message) -> None:
        if isinstance(message, Bye):
            pair.peer_is_out = True
            self.fault(pair, f"the peer closed: {message.reason}")
            self._learn(pair)
        elif isinstance(message, Canary):
            pair.expected = message.pattern
            self._look(pair)
        elif isinstance(message, Ready):
            pair.reached = message.pattern == pair.pattern
            self._become_ready(pair)
        elif pair.life is Life.OPEN or isinstance(message, Abort):
            self._notify(Heard(pair, message))
            self.settle(pair)

    def _on_data(self, pair: Pair) -> None:
        assert pair.reader is not None, "only TCP has a data connection"
        pair.heard_s = self._loop.time()
        try:
            actions = pair.reader.read(self._loop.time())
        except (OSError, MalformedFrame) as error:
            if isinstance(error, MalformedFrame):
                self.counters["malformed"] += 1
            self.fault(pair, str(error))
            return
        if actions:
            self._notify(Took(actions))
        if not pair.answered:
            self._look(pair)

    def _on_death(self, pair: Pair) -> None:
        self._loop.remove_reader(pair.pidfd)
        pair.peer_is_out = True
        self.fault(pair, "the process died")
        self._learn(pair)

    def _on_copier(self, pair: Pair, what: str, lease: int, checksum: int | None) -> None:
        if what in ("closed", "broken"):
            pair.copier_ended = True
            self.fault(pair, "the data connection broke")
        self._notify(Copied(pair, what, lease, checksum))
        if pair.copier_ended:
            pair.copier_is_out = True
            self.send(pair, Bye("the pair ended"))
            self.settle(pair)

    def _learn(self, pair: Pair) -> None:
        """More is known of a dying pair: its blocks may be free now."""
        pair.peer_is_out = pair.peer_is_out or pair.process_is_dead()
        if pair.peer_is_out and pair.life is Life.DYING:
            self._notify(Gone(pair, ""))
        self.settle(pair)

    def _flush(self, pair: Pair) -> None:
        try:
            if not pair.flush():
                self._loop.remove_writer(pair.sock)
        except OSError as error:
            self._loop.remove_writer(pair.sock)
            self.fault(pair, f"cannot send: {error}")
