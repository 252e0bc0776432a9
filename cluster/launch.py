"""Worker processes on Ray: placed, started, watched and ended. The only door of Ray.

Promises: everything asked for is placed, or one error names what is missing and nothing is left
behind; each rank of a worker is an actor in its bundle of a placement group (`bundles`), which the
worker's next incarnation takes over. A Ray started here lives and dies with this process: it
listens on the loopback address, asks a token of whoever connects, and writes only into the run's
folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..configs.errors import InvalidConfig
from ..configs.schema import RayConfig
from ..engine.request import WorkerId
from . import processes
from .bundles import KINDS, Group, Place, check_room, listed
from .processes import Process
from .reaper import Reaper
from .resources import Resources, resources_here
from .run_folder import RunFolder
from .spec import WorkerSpec
from .worker_actor import FollowerActor, LaunchError, Refused, Started, WorkerActor

# Read by Ray when it is imported, and by the processes that it starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# Ray runs workers at niceness 15; the step loop is no background job.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402
from ray.util.placement_group import (  # noqa: E402
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes; nothing of ours travels through it
PLACE_S = 30.0
PLACED_S = 1  # to hear that a group still is; Ray takes whole seconds
END_S = 5.0  # for a process to end by itself before it is killed
KILL_S = 1.0  # the same where nothing is left for it to do
LOG_LINES = 12

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A rank's place: a bundle of a placement group, and what it takes of that."""

    group: str
    bundle: int
    asks: Resources


class PlacedWorker(WorkerActor):
    """A worker on a Ray that spans machines listens where Ray's node does."""

    def start_on_node(self) -> Started | Refused:
        return self.start(ray.util.get_node_ip_address())

    def listen_on_node(self) -> str:
        return self.listen(ray.util.get_node_ip_address())


class PlacedFollower(FollowerActor):
    """The same for a rank above 0, whose node need not be its leader's."""

    def follow_on_node(self, address: str) -> str:
        return self.follow(address, ray.util.get_node_ip_address())


class RayLauncher:
    """Opened once, closed once. Calls that block run on one thread, which lives as long as the
    Ray that it started: the kernel ends Ray's processes with the thread that made them."""

    def __init__(self, config: RayConfig, groups: Sequence[Group]) -> None:
        """`groups` hold a place for every rank of every worker."""
        self._address = config.address
        self._asked = groups
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._folder: RunFolder | None = None
        self._reaper: Reaper | None = None
        self._others: set[Process] = set()  # children that are not Ray's
        self._groups: dict[str, PlacementGroup] = {}
        self._seats: dict[Place, Seat] = {}
        self._actors: dict[WorkerId, Any] = {}
        self._processes: dict[WorkerId, Process] = {}  # of workers on this machine
        self._followers: dict[WorkerId, list[Any]] = {}  # actors of the ranks above 0
        self._followed: dict[WorkerId, list[Process]] = {}  # theirs, on this machine

    async def open(self, connected: Callable[[], None]) -> None:
        """A Ray with a place for every worker; `connected` is called as soon as Ray runs.
        Raises InvalidConfig or LaunchError."""
        if self._address is None:
            has = resources_here()
            check_room(self._asked, {"this machine": has})
            await self._run(lambda: self._start_ray(has))
            connected()
            assert self._reaper is not None
            self._reaper.watch(self._rays())
        else:
            await self._run(self._join_ray)
            connected()
            check_room(self._asked, await self._run(_nodes))
        await self._run(self._place)

    async def start(self, spec: WorkerSpec) -> Started:
        """The worker, ready. Raises InvalidConfig or LaunchError, and leaves no process."""
        try:
            started = await self._start(spec)
        except BaseException:
            await self.stop(spec.worker, 0.0)
            raise
        process = processes.find(started.pid) if started.host == socket.gethostname() else None
        if process is not None:
            self._processes[spec.worker] = process
        if self._reaper is not None:
            self._reaper.watch(self._rays())
        return started

    async def wait_death(self, worker: WorkerId) -> str:
        """Why the worker's process or its loop ended, once it has."""
        try:
            reason = await _result(self._actors[worker].wait.remote())
        except RayError as error:
            reason = _first_line(error)
        return reason + self._last_words(worker)

    async def stop(self, worker: WorkerId, drain_s: float) -> None:
        """End a worker after it has finished what it has, `drain_s` at most. Surely dead when
        this returns if it was on this machine; else Ray has been told. Idempotent."""
        actor = self._actors.pop(worker, None)
        process = self._processes.pop(worker, None)
        followers = self._followers.pop(worker, [])
        ending = self._followed.pop(worker, [])
        if actor is None:
            return
        if drain_s:
            with contextlib.suppress(RayError, TimeoutError):  # it is ended below in any case
                await asyncio.wait_for(_result(actor.stop.remote(drain_s)), drain_s + END_S)
        for part in (actor, *followers):
            await self._run(partial(ray.kill, part, no_restart=True))
        if process is not None:
            ending.append(process)
        if ending:
            await asyncio.to_thread(processes.end, ending, within_s=KILL_S)

    async def close(self) -> None:
        """End every worker and the Ray that was started here, with all it wrote. Idempotent."""
        await self._run(self._close)
        self._thread.shutdown()

    def kill(self) -> None:
        """End everything on this machine at once, from any thread. For a second thought, after
        `close` took too long."""
        processes.kill(self._rays())

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _start(self, spec: WorkerSpec) -> Started:
        await self._run(partial(self._tell_lost_place, spec.worker))
        create = partial(self._create, spec, 0, PlacedWorker, spec)
        actor = self._actors[spec.worker] = await self._run(create)
        if spec.num_ranks > 1:
            await self._start_followers(spec, actor)
        start = actor.start if self._address is None else actor.start_on_node
        try:
            answer = await _result(start.remote())
        except RayError as error:
            reason = f"{spec.worker} did not start: {_first_line(error)}"
            raise LaunchError(reason + self._last_words(spec.worker)) from error
        if isinstance(answer, Started):
            return answer
        assert isinstance(answer, Refused)
        if answer.key:
            raise InvalidConfig(answer.key, answer.reason, answer.remedy)
        raise LaunchError(f"{spec.worker} did not start: {answer.reason}")

    async def _start_followers(self, spec: WorkerSpec, leader: Any) -> None:
        """Raises LaunchError. What becomes of them later is the leader's to tell."""
        listen = leader.listen if self._address is None else leader.listen_on_node
        followers = self._followers[spec.worker] = []
        try:
            address = await _result(listen.remote())
            for rank in range(1, spec.num_ranks):
                create = partial(self._create, spec, rank, PlacedFollower, spec, rank)
                followers.append(await self._run(create))
            for where in [await _result(follower.where.remote()) for follower in followers]:
                process = processes.find(where.pid) if where.host == socket.gethostname() else None
                if process is not None:
                    self._followed.setdefault(spec.worker, []).append(process)
            for follower in followers:
                follow = follower.follow if self._address is None else follower.follow_on_node
                follow.remote(address)
        except RayError as error:
            raise LaunchError(f"{spec.worker} did not start: {_first_line(error)}") from error

    def _tell_lost_place(self, worker: WorkerId) -> None:
        """A node that is gone took its bundles along; Ray looks for another one for them."""
        group = self._groups[self._seats[worker.name, 0].group]
        if not group.wait(PLACED_S):
            log.warning(
                "%s waits for a place: Ray has lost one, and has %s", worker, listed(_nodes())
            )

    def _create(self, spec: WorkerSpec, rank: int, kind: type, *arguments: Any) -> Any:
        """An actor of a worker's rank, in that rank's place."""
        seat = self._seats[spec.worker.name, rank]
        options: dict[str, Any] = {
            "num_cpus": seat.asks["CPU"],
            "num_gpus": seat.asks.get("GPU", 0.0),
            "resources": {kind: n for kind, n in seat.asks.items() if kind not in KINDS},
            "max_concurrency": 3,  # start, wait and stop
            "max_restarts": 0,  # the supervisor's: a restarted worker is a new incarnation
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._groups[seat.group], placement_group_bundle_index=seat.bundle
            ),
        }
        return ray.remote(kind).options(**options).remote(*arguments)

    def _start_ray(self, has: Mapping[str, float]) -> None:
        self._others = set(processes.descendants(os.getpid()))
        self._folder = RunFolder()
        self._reaper = Reaper(self._folder.path)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else kept in $HOME
        _init_ray(
            address="local",
            num_cpus=int(has["CPU"]),
            num_gpus=int(has["GPU"]),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._folder.path),
            _node_ip_address="127.0.0.1",
        )

    def _join_ray(self) -> None:
        try:
            _init_ray(address=self._address)
        except LaunchError as error:
            raise InvalidConfig(
                "ray.address", str(error), "start Ray there first, or set it to null"
            ) from error

    def _place(self) -> None:
        """Every group, or none."""
        for group in self._asked:
            self._groups[group.name] = placement_group(
                [bundle.asks for bundle in group.bundles], strategy="STRICT_SPREAD"
            )
            for index, bundle in enumerate(group.bundles):
                for place, asks in bundle.ranks.items():
                    self._seats[place] = Seat(group=group.name, bundle=index, asks=asks)
        for name, group in self._groups.items():
            if not group.wait(PLACE_S):
                raise InvalidConfig(
                    "ray.address",
                    f"Ray has no free place for {name} within {PLACE_S:g} s, with "
                    f"{listed(_nodes())}",
                    "end what else runs there, or lower replicas",
                )

    def _close(self) -> None:
        if not ray.is_initialized():
            self._remove_folder()
            return
        if self._address is not None:
            for actor in self._actors.values():
                ray.kill(actor, no_restart=True)
            for group in self._groups.values():
                remove_placement_group(group)
            ray.shutdown()
            return
        rays = self._rays()
        ray.shutdown()
        killed = processes.end(rays, within_s=END_S)
        if killed:
            log.warning("%d of Ray's processes had to be killed", len(killed))
        self._remove_folder()

    def _rays(self) -> set[Process]:
        """Ray's processes on this machine, workers included."""
        reaper = set() if self._reaper is None else {self._reaper.process}
        return set(processes.descendants(os.getpid())) - self._others - reaper

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        if self._reaper is not None:
            self._reaper.close()
            self._reaper = None

    def _last_words(self, worker: WorkerId) -> str:
        """The end of what a worker's process wrote, which goes when the run's folder goes."""
        process = self._processes.get(worker)
        if process is None or self._folder is None:
            return ""
        pattern = f"session_latest/logs/worker-*-{process.pid}.err"
        lines = [
            line
            for path in self._folder.path.glob(pattern)
            for line in path.read_text(errors="replace").splitlines()
        ]
        return "".join(f"\n    {line}" for line in lines[-LOG_LINES:])


def _init_ray(**options: Any) -> None:
    """Raises LaunchError for whatever keeps Ray from running."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(configure_logging=False, log_to_driver=False, **options)
    except (RayError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise LaunchError(f"Ray does not run: {_first_line(error)}") from error


def _nodes() -> dict[str, Resources]:
    """What each live node of Ray has, by its address; a part of its id tells equal ones apart."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    return {
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})": node[
            "Resources"
        ]
        for address, node in zip(addresses, alive, strict=True)
    }


async def _result(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


def _first_line(error: BaseException) -> str:
    """Ray's errors carry whole tracebacks; the last line of one names its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]
