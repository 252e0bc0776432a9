"""The gateway's end of the long-lived stream to one worker.

Promises: every slot that is opened gets exactly one outcome, in bounded time: what the worker
said, or `Lost` when the connection ended, the worker fell silent, its model step hangs, or it left
an abort unanswered.
A token costs one look-up and one call: no queue, task or message of its own. What is sent in one
tick of the loop travels as one message.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from ..engine.errors import PhasewiseError, Unavailable
from ..engine.request import TokenLogprobs, WorkerId
from ..engine.routing import KnownPrefixes
from . import wire
from .proto import worker_pb2 as pb
from .proto.worker_pb2_grpc import WorkerStub
from .stream import TokenStream

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a restarted worker is a new connection
    ("grpc.initial_reconnect_backoff_ms", 100),
)
MAX_MESSAGE_TOKENS = 512 * 1024  # prompt tokens in one message, about 2 MB
SILENCE_TICKS = 5  # checks without a message after which a worker is lost


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkTimes:
    connect_s: float = 5.0
    heartbeat_s: float = 1.0  # silence after which the worker is lost
    step_s: float = 120.0  # so is one whose model step has run for longer
    abort_s: float = 10.0  # an abort unanswered for so long ends the slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """The worker can say no more about this slot."""

    reason: str
    worker: str = ""  # who was lost, where that is not who was asked last


Outcome = pb.Handoff | pb.Finished | pb.Failed | Lost


class Slot:
    """A request on this link, from `submit` or `resume` to its outcome."""

    __slots__ = ("aborted", "number", "outcome", "stream")

    def __init__(self, number: int, stream: TokenStream) -> None:
        self.number = number
        self.stream = stream
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.aborted = False

    def resolve(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class ProtocolError(PhasewiseError):
    """The worker said something that `worker.proto` does not allow."""


class WorkerLink:
    """Open with `connect`, once. `closed` tells why the link ended."""

    def __init__(self, address: str, times: LinkTimes, clock: Callable[[], float]) -> None:
        self.address = address
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.description = pb.Description()
        self.load = pb.Load()
        self.prefixes = KnownPrefixes()
        self.last_heard_s = clock()
        self._times = times
        self._clock = clock
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = WorkerStub(self._channel)
        self._slots: dict[int, Slot] = {}
        self._free_numbers: list[int] = []
        self._outbox: list[pb.Submit | pb.Resume | int] = []  # int: abort that slot
        self._draining = False
        self._outgoing = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def worker(self) -> WorkerId:
        return wire.worker_id(self.description.worker)

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    async def describe(self, timeout_s: float) -> pb.Description:
        """Ask the worker about itself. Raises Unavailable."""
        try:
            call = self._stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.UsageError as error:
            raise Unavailable(f"the connection to {self.address} is closed") from error
        try:
            self.description = await call
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"worker at {self.address}: {_said(error)}") from error
        except asyncio.CancelledError:
            # `close` cancels the call, not the task that waits for it. Let through, this would
            # end a handler of gRPC without an answer, and its caller would wait for ever.
            if _being_cancelled():
                raise
            raise Unavailable(f"the connection to {self.address} was closed meanwhile") from None
        return self.description

    async def connect(self) -> None:
        """Attach and learn who is there. Raises Unavailable, and leaves nothing open then."""
        try:
            async with asyncio.timeout(self._times.connect_s):
                # Fails at once where nobody listens: gRPC's own waiting backs off for seconds.
                await self.describe(self._times.connect_s)
        except TimeoutError as error:
            await self.close(f"no answer within {self._times.connect_s} s")
            raise Unavailable(f"worker at {self.address} does not answer") from error
        except BaseException:
            await self.close("connecting failed")
            raise
        self.load = self.description.load
        try:
            self._check_step()
        except Unavailable as error:
            await self.close(str(error))
            raise
        self.last_heard_s = self._clock()
        call = self._stub.Attach()
        self._tasks = [
            asyncio.create_task(self._read(call)),
            asyncio.create_task(self._write(call)),
            asyncio.create_task(self._watch()),
        ]

    def submit(
        self, stream: TokenStream, request: pb.Request, decode: pb.TransferAddress | None
    ) -> Slot:
        """Compute a prompt: for `decode`, or to go on there. Raises Unavailable."""
        slot = self._open(stream)
        self._send(pb.Submit(slot=slot.number, request=request, decode=decode))
        return slot

    def resume(self, stream: TokenStream, request: pb.Request, handoff: pb.Handoff) -> Slot:
        """Go on after `handoff`. Raises Unavailable."""
        slot = self._open(stream)
        self._send(
            pb.Resume(
                slot=slot.number,
                request=request,
                first_token=handoff.first_token,
                lease=handoff.lease,
                granted=handoff.granted,
                source=handoff.source,
            )
        )
        return slot

    def abort(self, slot: Slot) -> None:
        """Have the worker drop a request. Its outcome still comes, here or after `abort_s`."""
        if slot.aborted or slot.outcome.done():
            return
        slot.aborted = True
        self._send(slot.number)
        late = Lost(reason=f"{self.worker} left an abort unanswered for {self._times.abort_s} s")
        asyncio.get_running_loop().call_later(self._times.abort_s, slot.resolve, late)

    def drain(self) -> None:
        """Have the worker take no new work."""
        self._draining = True
        self._outgoing.set()

    async def close(self, reason: str) -> None:
        """End the connection; every open slot is `Lost`."""
        self._lose(reason)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def _open(self, stream: TokenStream) -> Slot:
        if self.closed.done():
            raise Unavailable(f"{self.worker} is lost: {self.closed.result()}")
        number = self._free_numbers.pop() if self._free_numbers else len(self._slots)
        assert number not in self._slots, "a slot number is used once at a time"
        slot = self._slots[number] = Slot(number, stream)
        return slot

    def _send(self, entry: pb.Submit | pb.Resume | int) -> None:
        self._outbox.append(entry)
        self._outgoing.set()

    def _lose(self, reason: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(reason)
        for slot in self._slots.values():
            slot.resolve(Lost(reason=reason))
        self._slots.clear()
        self._outbox.clear()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            async for message in call:
                self.last_heard_s = self._clock()
                self._dispatch(message)
            self._lose("the worker ended the stream")
        except grpc.aio.AioRpcError as error:
            self._lose(_said(error))
        except (ProtocolError, Unavailable) as error:
            self._lose(str(error))
            call.cancel()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """Writes are the connection's back-pressure: one at a time, each with all that waits."""
        told = False
        try:
            while True:
                await self._outgoing.wait()
                self._outgoing.clear()
                while self._outbox:
                    await call.write(self._next_message())
                if self._draining and not told:
                    told = True
                    await call.write(pb.ToWorker(drain=True))
        except grpc.aio.AioRpcError as error:
            self._lose(_said(error))
        except asyncio.InvalidStateError:  # the call is over; its reader knows why
            self._lose("the stream was closed")

    def _next_message(self) -> pb.ToWorker:
        message = pb.ToWorker()
        tokens = taken = 0
        for entry in self._outbox:
            if isinstance(entry, int):
                message.abort.append(entry)
            else:
                tokens += len(entry.request.token_ids)
                if tokens > MAX_MESSAGE_TOKENS and taken:
                    break
                if isinstance(entry, pb.Submit):
                    message.submit.append(entry)
                else:
                    message.resume.append(entry)
            taken += 1
        del self._outbox[:taken]
        return message

    async def _watch(self) -> None:
        """Counts checks rather than seconds, so that a stall of this process is not taken for
        the worker's silence: between two checks the reader always had its turn."""
        silent, heard_s = 0, self.last_heard_s
        while silent < SILENCE_TICKS:
            await asyncio.sleep(self._times.heartbeat_s / SILENCE_TICKS)
            silent = silent + 1 if self.last_heard_s == heard_s else 0
            heard_s = self.last_heard_s
        self._lose(f"no heartbeat for {self._times.heartbeat_s} s")

    def _dispatch(self, message: pb.FromWorker) -> None:
        """Tokens first: a terminal entry's last token stands in the same message or before."""
        slots = self._slots
        try:
            beside = _logprobs_by_slot(message) if message.logprobs else {}
            for number, token_id in zip(message.slots, message.token_ids, strict=True):
                if number in beside:
                    slots[number].stream.push(token_id, beside[number].popleft())
                else:
                    slots[number].stream.push(token_id)
            for outcomes in (message.handoffs, message.finished, message.failed):
                for outcome in outcomes:
                    self._retire(slots.pop(outcome.slot), outcome)
        except (KeyError, ValueError, IndexError) as error:
            raise ProtocolError(f"{self.worker} sent columns that do not fit: {error!r}") from error
        if message.HasField("prefixes"):
            news = message.prefixes
            self.prefixes.learn(reset=news.reset, added=news.added, removed=news.removed)
        if message.HasField("load"):
            self.load = message.load
            self._check_step()

    def _check_step(self) -> None:
        """A worker's loop beats while its compute thread hangs. Raises Unavailable."""
        age_s = self.load.step_age_s
        if age_s > self._times.step_s:
            raise Unavailable(
                f"{self.worker}: a model step has run for {age_s:.0f} s; "
                f"gateway.step_timeout_s allows {self._times.step_s:g} s"
            )

    def _retire(self, slot: Slot, outcome: Outcome) -> None:
        """The number may be used again, so an abort that waits to be sent must not meet it."""
        if slot.aborted and slot.number in self._outbox:
            self._outbox.remove(slot.number)
        self._free_numbers.append(slot.number)
        slot.resolve(outcome)


def _logprobs_by_slot(message: pb.FromWorker) -> dict[int, deque[TokenLogprobs]]:
    """In the order of the slot's tokens, of which a message can hold several when the gateway
    reads slower than the worker steps."""
    beside: defaultdict[int, deque[TokenLogprobs]] = defaultdict(deque)
    for entry in message.logprobs:
        beside[entry.slot].append(wire.logprobs_from_pb(entry))
    return beside


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _said(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
