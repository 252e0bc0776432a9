"""The front door put together: admission, router and fleet behind gRPC, health and HTTP.

Runs on the caller's event loop. Listens nowhere before `start`, and nowhere after `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..configs.schema import SloConfig
from ..engine.errors import InvalidConfig, Unavailable
from ..engine.routing import POLICIES
from .admin import AdminService
from .admission import Admission, AdmissionLimits
from .fleet import Fleet, WorkerState
from .generation import GenerationService
from .http import HttpServer
from .metrics import Metrics
from .proto import phasewise_pb2 as pb
from .proto import phasewise_pb2_grpc as pb_grpc
from .router import Router, RouterLimits
from .served_model import ServedModel
from .worker_link import LinkTimes

GENERATION = pb.DESCRIPTOR.services_by_name["Generation"].full_name
ADMIN = pb.DESCRIPTOR.services_by_name["Admin"].full_name
HEALTH_S = 0.1  # between looks at whether the service can serve
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a shared port
    # A prompt too long is refused by admission, which can name the field and the limit.
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.http2.max_ping_strikes", 0),  # clients may ping as often as they like
)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings:
    grpc_address: str  # "host:port"; port 0: any free one
    http_address: str | None = None
    policy: str = "prefix_aware"  # for both pools
    router: RouterLimits = field(default_factory=RouterLimits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    times: LinkTimes = field(default_factory=LinkTimes)
    slo: SloConfig = field(default_factory=SloConfig)  # told to who asks for the status


class Gateway:
    """Workers join by `add_worker` at any time while it runs; the supervisor replaces them."""

    def __init__(
        self,
        served: ServedModel,
        settings: GatewaySettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.fleet = Fleet(settings.times, clock)
        self.metrics = Metrics(self.fleet)
        policy = POLICIES[settings.policy]
        self.router = Router(
            self.fleet,
            served,
            settings.router,
            self.metrics,
            clock,
            prefill_policy=policy(),
            decode_policy=policy(),
        )
        self.admission = Admission(served, settings.admission, clock)
        self.admin = AdminService(
            router=self.router,
            fleet=self.fleet,
            metrics=self.metrics,
            served=served,
            slo=settings.slo,
            state=lambda: self.state,
            clock=clock,
        )
        self.grpc_address = ""  # bound, once started
        self.http_address: str | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._watch: asyncio.Task[None] | None = None
        self._was_complete = False

    @property
    def state(self) -> str:
        """starting | ready | unavailable | draining"""
        if self.router.draining:
            return "draining"
        if self.router.can_serve() and self._was_complete:
            return "ready"
        return "unavailable" if self._was_complete else "starting"

    def add_worker(self, address: str, role: str, *, name: str = "", restarts: int = 0) -> None:
        self.fleet.add(address, role, name=name, restarts=restarts)

    async def start(self) -> None:
        """Listen. Raises InvalidConfig for an address that cannot be had, and listens nowhere
        then."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        pb_grpc.add_GenerationServicer_to_server(
            GenerationService(self.admission, self.router), server
        )
        pb_grpc.add_AdminServicer_to_server(self.admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (GENERATION, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            self.grpc_address = _bind(server, self.settings.grpc_address)
            if self.settings.http_address is not None:
                self._http = HttpServer(self, self.settings.http_address)
                self.http_address = self._http.address
        except InvalidConfig:
            await server.stop(None)
            raise
        for service, status in (("", _NOT_SERVING), (GENERATION, _NOT_SERVING), (ADMIN, _SERVING)):
            await self._health.set(service, status)
        await server.start()
        self._server = server
        if self._http is not None:
            await self._http.start()
        self._watch = asyncio.create_task(self._follow_health())

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once every worker that was added is ready. Raises Unavailable with those that
        are not."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.state != "ready":
                    await asyncio.sleep(HEALTH_S / 5)
        except TimeoutError as error:
            missing = [
                f"{w.name or w.address} is {w.state} {w.reason}".strip()
                for w in self.fleet.workers
                if w.state != WorkerState.READY
            ]
            raise Unavailable(
                f"not ready within {timeout_s:g} s: {'; '.join(missing) or 'no decode worker'}"
            ) from error

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new, finish what runs; returns how many streams were cut off."""
        return await self.router.drain(timeout_s)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Drain, end what is left as unavailable, close every connection."""
        await self.router.drain(drain_s)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._http is not None:
            await self._http.stop()
        server, self._server = self._server, None
        if server is not None:  # grpc.aio does not survive a second stop
            await server.stop(grace=1.0)
        await self.fleet.close()

    async def _follow_health(self) -> None:
        told = _NOT_SERVING
        while True:
            workers = self.fleet.workers
            self._was_complete |= (
                bool(workers)
                and self.router.can_serve()
                and all(w.state == WorkerState.READY for w in workers)
            )
            now = _SERVING if self.state == "ready" else _NOT_SERVING
            if now != told:
                told = now
                for service in ("", GENERATION):
                    await self._health.set(service, now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_S):  # wait_for can swallow a cancellation
                    await self.fleet.changed.wait()
            self.fleet.changed.clear()


def _bind(server: grpc.aio.Server, address: str) -> str:
    """The address with the port that was bound."""
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidConfig(
            "gateway.grpc",
            f"cannot listen on {address}: it is taken or not an address of this host",
            "choose another port, or 0 for any free one",
        ) from error
    return f"{address.rpartition(':')[0]}:{port}"
