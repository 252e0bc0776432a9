"""The gRPC service that operators call: what runs where, and taking it out of service."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import grpc

from ..configs.schema import SloConfig
from ..engine.errors import InvalidRequest, PhasewiseError
from .fleet import Fleet, Worker
from .generation import abort_call
from .metrics import Metrics
from .proto import phasewise_pb2 as pb
from .proto.phasewise_pb2_grpc import AdminServicer
from .router import Router
from .served_model import ServedModel

DRAIN_S = 30.0
POLL_S = 0.02


class AdminService(AdminServicer):
    """`state` tells the gateway's own state; `clock` is the router's."""

    def __init__(
        self,
        *,
        router: Router,
        fleet: Fleet,
        metrics: Metrics,
        served: ServedModel,
        slo: SloConfig,
        state: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._fleet = fleet
        self._metrics = metrics
        self._served = served
        self._slo = slo
        self._state = state
        self._clock = clock
        self._started_s = clock()

    async def Status(
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClusterStatus:
        return await self.status()

    async def status(self) -> pb.ClusterStatus:
        gateway = pb.GatewayStatus(
            state=self._state(),
            model=self._served.name,
            max_model_len=self._served.max_model_len,
            in_flight=self._router.in_flight,
            max_in_flight=self._router.limits.max_in_flight,
            uptime_s=self._clock() - self._started_s,
            ended=self._metrics.ended,
            output_tokens=self._metrics.output_tokens,
            failovers=self._metrics.failovers,
            local_prefills=self._metrics.local_prefills,
            pid=os.getpid(),
            cpu_s=time.process_time(),
            vocab_size=self._served.vocab_size,
            ttft_ms=self._slo.ttft_ms,
            tpot_ms=self._slo.tpot_ms,
            attainment=self._slo.attainment,
        )
        return pb.ClusterStatus(gateway=gateway, workers=await self._fleet.status())

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext
    ) -> pb.DrainResponse:
        timeout_s = request.timeout_s if request.HasField("timeout_s") else DRAIN_S
        try:
            if not 0 <= timeout_s <= 86400:
                raise InvalidRequest("timeout_s", f"{timeout_s} s", "give 0 to 86400 seconds")
            if not request.worker:
                return pb.DrainResponse(unfinished=await self._router.drain(timeout_s))
            unfinished = await self._drain(self._find(request.worker), timeout_s)
            return pb.DrainResponse(unfinished=unfinished)
        except PhasewiseError as error:
            await abort_call(context, error)

    def _find(self, name: str) -> Worker:
        worker = self._fleet.find(name)
        if worker is None:
            known = ", ".join(w.name for w in self._fleet.workers) or "none at all"
            raise InvalidRequest("worker", f"{name!r} is not known", f"use one of: {known}")
        return worker

    async def _drain(self, worker: Worker, timeout_s: float) -> int:
        worker.drain()
        deadline_s = self._clock() + timeout_s
        while worker.requests and self._clock() < deadline_s:
            await asyncio.sleep(POLL_S)
        return worker.requests
