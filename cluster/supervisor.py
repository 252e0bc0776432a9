"""Keeps the wanted workers alive: starts them, notices their end, starts the next incarnation.

Promises: a worker that died or fell silent is surely dead before the next incarnation starts; a
worker that dies again and again is left down for a while, with a message that says so; nothing
is started once `stop` was called. Knows neither Ray nor gRPC: `Launcher` is the seam.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..engine.request import WorkerId
from .fleet import Fleet, WorkerState
from .spec import WorkerSpec
from .worker_actor import Started

log = logging.getLogger(__name__)

POLL_S = 0.1  # between looks at a worker's link
WINDOW_S = 60.0  # in which deaths are counted
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0


class Launcher(Protocol):
    """Starts and ends worker processes. One incarnation of a name lives at a time."""

    async def start(self, spec: WorkerSpec) -> Started:
        """Ready; or LaunchError, InvalidConfig where the file is at fault, and no process."""
        ...

    async def wait_death(self, worker: WorkerId) -> str:
        """Why the process ended, once it has."""
        ...

    async def stop(self, worker: WorkerId, drain_s: float) -> None:
        """Surely dead when it returns. With 0, at once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartPolicy:
    """When a worker is started again. Decides only; deaths are times on any one clock."""

    max_restarts: int  # within WINDOW_S; 0: never restarted

    def delay_s(self, deaths_s: Sequence[float], now_s: float) -> float | None:
        """Seconds to wait after the last of `deaths_s`; None: never.

        At once after one death, doubling from FIRST_DELAY_S after more of them; past
        `max_restarts` of them it waits until the oldest that counts is out of the window.
        """
        if not self.max_restarts:
            return None
        recent = [death for death in deaths_s if now_s - death < WINDOW_S]
        if len(recent) > self.max_restarts:
            return recent[-self.max_restarts - 1] + WINDOW_S - now_s
        if len(recent) <= 1:
            return 0.0
        return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (len(recent) - 2))

    def is_open(self, deaths_s: Sequence[float], now_s: float) -> bool:
        """Whether the worker has died too often to be started again soon."""
        recent = [death for death in deaths_s if now_s - death < WINDOW_S]
        return len(recent) > self.max_restarts


class Supervisor:
    """One task a worker. `silence_s`: a lost link that does not come back for so long means
    that the process, if it lives, is to be killed."""

    def __init__(
        self,
        launcher: Launcher,
        fleet: Fleet,
        policy: RestartPolicy,
        clock: Callable[[], float],
        *,
        silence_s: float,
    ) -> None:
        self._launcher = launcher
        self._fleet = fleet
        self._policy = policy
        self._clock = clock
        self._silence_s = silence_s
        self._tasks: list[asyncio.Task[None]] = []
        self._live: set[WorkerId] = set()

    async def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start all at once. Raises the first error, after every other start has ended too."""
        results = await asyncio.gather(
            *(self._launch(spec) for spec in specs), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        for spec, started in zip(specs, results, strict=True):
            assert isinstance(started, Started)
            self._join(spec, started, restarts=0)
            keeper = asyncio.create_task(self._keep(spec, started), name=spec.worker.name)
            keeper.add_done_callback(_tell_broken)
            self._tasks.append(keeper)

    async def stop(self, drain_s: float) -> None:
        """End every worker; each may finish what it has within `drain_s`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        live = tuple(self._live)
        self._live.clear()
        await asyncio.gather(*(self._launcher.stop(worker, drain_s) for worker in live))

    async def _launch(self, spec: WorkerSpec) -> Started:
        started = await self._launcher.start(spec)
        self._live.add(spec.worker)
        return started

    def _join(self, spec: WorkerSpec, started: Started, *, restarts: int) -> None:
        name = spec.worker.name
        self._fleet.add(started.address, spec.role, name=name, restarts=restarts)

    async def _keep(self, spec: WorkerSpec, started: Started) -> None:
        """One name, one incarnation after the other, until cancelled."""
        deaths_s: list[float] = []
        while True:
            reason = await self._end(spec, started)
            deaths_s.append(self._clock())
            log.warning("%s ended: %s", spec.worker, reason)
            self._fleet.mark_restarting(started.address)
            spec, fresh = await self._restart(spec, deaths_s)
            await self._fleet.remove(started.address)
            started = fresh
            self._join(spec, started, restarts=spec.worker.incarnation - 1)
            log.warning("%s is ready at %s", spec.worker, started.address)

    async def _end(self, spec: WorkerSpec, started: Started) -> str:
        """Wait for the worker's death or lasting silence; it is dead when this returns."""
        death = asyncio.create_task(self._launcher.wait_death(spec.worker))
        silence = asyncio.create_task(self._silence(started.address))
        try:
            done, _ = await asyncio.wait({death, silence}, return_when=asyncio.FIRST_COMPLETED)
            reason = (death if death in done else silence).result()
        finally:
            death.cancel()
            silence.cancel()
        self._live.discard(spec.worker)
        await self._launcher.stop(spec.worker, 0.0)
        return reason

    async def _silence(self, address: str) -> str:
        silent_s: float | None = None
        while True:
            worker = self._fleet.find(address)
            lost = worker is not None and worker.state == WorkerState.LOST
            now_s = self._clock()
            silent_s = (now_s if silent_s is None else silent_s) if lost else None
            if silent_s is not None and now_s - silent_s >= self._silence_s:
                why = f": {worker.reason}" if worker is not None and worker.reason else ""
                return f"lost for {self._silence_s:g} s, killed{why}"
            await asyncio.sleep(POLL_S)

    async def _restart(self, spec: WorkerSpec, deaths_s: list[float]) -> tuple[WorkerSpec, Started]:
        """The next incarnation that gets ready; those that do not are deaths too."""
        while True:
            del deaths_s[: -self._policy.max_restarts - 1]
            await self._wait(spec, deaths_s)
            worker = replace(spec.worker, incarnation=spec.worker.incarnation + 1)
            spec = replace(spec, worker=worker)
            try:
                return spec, await self._launch(spec)
            except Exception as error:  # whatever a launcher raises, its worker is still wanted
                log.warning("%s did not start: %s", worker, error)
                deaths_s.append(self._clock())

    async def _wait(self, spec: WorkerSpec, deaths_s: Sequence[float]) -> None:
        now_s = self._clock()
        delay_s = self._policy.delay_s(deaths_s, now_s)
        name = spec.worker.name
        if delay_s is None:
            log.error("%s stays down: gateway.max_restarts is 0", name)
            await asyncio.Event().wait()  # until the cluster stops
            return
        if self._policy.is_open(deaths_s, now_s):
            log.error(
                "%s died %d times within %.0f s and is left down for %.0f s; the reasons stand "
                "above, gateway.max_restarts sets how many are too many",
                *(name, len(deaths_s), WINDOW_S, delay_s),
            )
        await asyncio.sleep(delay_s)


def _tell_broken(keeper: asyncio.Task[None]) -> None:
    """It ends by being cancelled, or by a bug."""
    if not keeper.cancelled() and (error := keeper.exception()) is not None:
        name = keeper.get_name()
        log.error("nobody restarts %s any more: its keeper broke", name, exc_info=error)
