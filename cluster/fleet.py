"""The workers a gateway knows: who is there, in what state, and how much is before each.

Promises: a worker that is lost is attached again as soon as it answers, under the incarnation it
then tells; a restarted worker is a new peer. Joining and leaving need no restart of anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..engine.errors import PhasewiseError
from ..engine.routing import WorkerView
from .proto import phasewise_pb2 as front
from .worker_link import LinkTimes, WorkerLink

REATTACH_S = 0.2  # between attempts to reach a lost worker
DESCRIBE_S = 0.5

BlockNames = Mapping[int, Sequence[int]]  # of a prompt's full blocks, by their size in tokens


class WorkerState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    RESTARTING = "restarting"


class Worker:
    """One place in the fleet, and whatever process stands there now."""

    def __init__(self, *, name: str, address: str, role: str, restarts: int) -> None:
        self.name = name
        self.address = address
        self.role = role
        self.restarts = restarts
        self.reason = ""  # why it is lost
        self.link: WorkerLink | None = None
        self.outstanding_tokens = 0  # sent by this gateway, not ended
        self.requests = 0
        self.state_when_down = WorkerState.STARTING
        self.keeper: asyncio.Task[None] | None = None
        self._draining = False

    @property
    def state(self) -> WorkerState:
        if self.link is None or self.link.closed.done():
            return self.state_when_down
        if self._draining or self.link.load.draining:
            return WorkerState.DRAINING
        return WorkerState.READY

    @property
    def peer(self) -> str:
        return self.name if self.link is None else str(self.link.worker)

    def drain(self) -> None:
        self._draining = True
        if self.link is not None:
            self.link.drain()

    @contextlib.contextmanager
    def holding(self, num_tokens: int) -> Iterator[None]:
        """Counts a request as being before this worker, for the policies."""
        self.outstanding_tokens += num_tokens
        self.requests += 1
        try:
            yield
        finally:
            self.outstanding_tokens -= num_tokens
            self.requests -= 1

    def view(self, names: BlockNames) -> WorkerView:
        """As a policy sees it for a prompt whose full blocks are called `names`."""
        assert self.link is not None, "only workers that are ready are looked at"
        load, description = self.link.load, self.link.description
        size = description.block_size
        reported = load.queued_tokens + (load.context_tokens if self.role == "decode" else 0)
        return WorkerView(
            name=self.name,
            outstanding_tokens=max(reported, self.outstanding_tokens),
            requests=self.requests,
            cached_tokens=self.link.prefixes.count(names.get(size, ())) * size,
        )


class Fleet:
    """All workers, by address."""

    def __init__(self, times: LinkTimes, clock: Callable[[], float]) -> None:
        self._times = times
        self._clock = clock
        self._workers: dict[str, Worker] = {}
        self.changed = asyncio.Event()  # set at every change of state; readers clear it

    @property
    def workers(self) -> Sequence[Worker]:
        return tuple(self._workers.values())

    def add(self, address: str, role: str, *, name: str = "", restarts: int = 0) -> None:
        """A worker to attach to and keep attached to, in the running loop."""
        if role not in ("prefill", "decode"):
            raise ValueError(f"role is prefill or decode, not {role!r}")
        if address in self._workers:
            raise ValueError(f"worker at {address} is already known; remove it first")
        worker = Worker(name=name or address, address=address, role=role, restarts=restarts)
        self._workers[address] = worker
        worker.keeper = asyncio.create_task(self._keep(worker))

    async def remove(self, address: str) -> None:
        """Forget a worker. What it still serves goes on elsewhere, as after a loss."""
        worker = self._workers.pop(address, None)
        if worker is None or worker.keeper is None:
            return
        worker.keeper.cancel()
        await asyncio.wait([worker.keeper])
        if worker.link is not None:
            await worker.link.close("the worker was removed")
        self.changed.set()

    def mark_restarting(self, address: str) -> None:
        """Say in `status` that a lost worker is being replaced."""
        if address in self._workers:
            self._workers[address].state_when_down = WorkerState.RESTARTING

    def ready(self, role: str) -> list[Worker]:
        return [w for w in self._workers.values() if w.role == role and w.state == "ready"]

    def find(self, name: str) -> Worker | None:
        return next((w for w in self._workers.values() if name in (w.name, w.address)), None)

    async def close(self) -> None:
        for address in tuple(self._workers):
            await self.remove(address)

    async def _keep(self, worker: Worker) -> None:
        """Attached, or about to try again, until the worker is removed."""
        while True:
            link = WorkerLink(worker.address, self._times, self._clock)
            try:
                await link.connect()
            except PhasewiseError as error:
                worker.reason = str(error)
            else:
                worker.link = link
                worker.name = link.worker.name or worker.name
                worker.role = link.description.role or worker.role
                worker.reason = ""
                self.changed.set()
                worker.reason = await asyncio.shield(link.closed)
                worker.state_when_down = WorkerState.LOST
                self.changed.set()
                await link.close(worker.reason)
            await asyncio.sleep(REATTACH_S)

    async def status(self) -> list[front.WorkerStatus]:
        """Rows as each worker reports itself now, or last did."""
        return list(await asyncio.gather(*(self._status(w) for w in self._workers.values())))

    async def _status(self, worker: Worker) -> front.WorkerStatus:
        row = front.WorkerStatus(
            name=worker.name,
            role=worker.role,
            state=worker.state,
            address=worker.address,
            restarts=worker.restarts,
            reason=worker.reason,
        )
        link = worker.link
        if link is None:
            return row
        if not link.closed.done():
            with contextlib.suppress(PhasewiseError):  # then the row shows the last heartbeat
                link.load = (await link.describe(DESCRIBE_S)).load
        return _described(row, link, self._clock())


def _described(row: front.WorkerStatus, link: WorkerLink, now_s: float) -> front.WorkerStatus:
    description, load = link.description, link.load
    row.incarnation = description.worker.incarnation
    row.pid = description.pid
    row.device = description.device
    for kind in ("total", "free", "active", "cached", "leased"):
        setattr(row, f"blocks_{kind}", getattr(load.blocks, kind))
    row.blocks_used = load.blocks.active + load.blocks.leased
    for name in (
        *("running", "waiting", "queued_tokens", "context_tokens", "leases"),
        *("steps", "preemptions", "step_age_s", "hit_tokens", "asked_tokens"),
    ):
        setattr(row, name, getattr(load, name))
    row.heartbeat_age_s = now_s - link.last_heard_s
    row.open_slots = link.num_slots
    for pair in description.pairs:
        row.pairs.add(
            peer=f"{pair.peer.name}#{pair.peer.incarnation}",
            transport=pair.transport,
            ready=pair.ready,
            bytes=pair.bytes,
            transfers=pair.transfers,
            failures=pair.failures,
        )
    return row
