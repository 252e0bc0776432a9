"""A cluster in operation: gateway, supervisor and launcher of one cluster file, as one thing.

Promises: `start` either returns with everything ready or raises and leaves nothing behind; after
`stop` no process, port or folder of it is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from ..configs.schema import ClusterConfig
from .bundles import groups_of
from .gateway import Gateway, GatewaySettings
from .launch import RayLauncher
from .resources import worker_specs
from .router import RouterLimits
from .served_model import load_served_model
from .supervisor import RestartPolicy, Supervisor
from .worker_link import LinkTimes

log = logging.getLogger(__name__)

ATTACH_S = 30.0  # from a worker that is ready to one that is attached
SILENCE_S = 3.0  # how long a lost worker may stay silent before its process is killed
END_S = 20.0  # for workers and gateway to end, once drained
WORKERS_DRAIN_S = 2.0  # for workers whose gateway has drained already


class Service:
    """Start once, stop once."""

    def __init__(self, config: ClusterConfig) -> None:
        """`config` has been validated, so that its model's limits are known."""
        self.config = config
        name = config.model.served_name or config.model.path.name
        served = load_served_model(
            config.model.path, name=name, max_model_len=config.model.max_model_len
        )
        self.gateway = Gateway(served, gateway_settings(config))
        self._launcher = RayLauncher(config.ray, groups_of(config))
        self._supervisor = Supervisor(
            self._launcher,
            self.gateway.fleet,
            RestartPolicy(max_restarts=config.gateway.max_restarts),
            time.monotonic,
            silence_s=SILENCE_S,
        )

    async def start(self, connected: Callable[[], None] = lambda: None) -> None:
        """Everything, or an error and nothing. Raises InvalidConfig, LaunchError, Unavailable.

        `connected` is called once Ray runs: Ray puts its own handlers in the place of the
        process's signal handlers.
        """
        try:
            await self.gateway.start()  # a port that is taken is known before Ray is started
            await self._launcher.open(connected)
            cores = len(os.sched_getaffinity(0))
            await self._supervisor.start(worker_specs(self.config, cores))
            await self.gateway.wait_ready(ATTACH_S)
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, drain_s: float, *, hurry: asyncio.Event | None = None) -> int:
        """Let what runs finish within `drain_s` or until `hurry` is set, then end everything.
        Returns how many streams were cut off."""
        unfinished = await self._drain(drain_s, hurry or asyncio.Event())
        in_hurry = drain_s == 0.0 or (hurry is not None and hurry.is_set())
        try:
            async with asyncio.timeout(END_S):
                await self._supervisor.stop(0.0 if in_hurry else WORKERS_DRAIN_S)
                await self.gateway.stop()
        except TimeoutError:
            log.error("workers or gateway did not end within %.0f s and are killed", END_S)
        finally:
            await self._launcher.close()
        return unfinished

    async def _drain(self, drain_s: float, hurry: asyncio.Event) -> int:
        drain = asyncio.create_task(self.gateway.drain(drain_s))
        hurried = asyncio.create_task(hurry.wait())
        try:
            await asyncio.wait({drain, hurried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()
        if drain.done():
            return drain.result()
        drain.cancel()
        return await self.gateway.drain(0.0)

    def kill(self) -> None:
        """End every process below this one at once."""
        self._launcher.kill()


def gateway_settings(config: ClusterConfig) -> GatewaySettings:
    gateway = config.gateway
    return GatewaySettings(
        grpc_address=gateway.grpc,
        http_address=gateway.http,
        policy=gateway.policy,
        router=RouterLimits(
            local_prefill=config.decode.local_prefill if config.prefill.replicas else "always",
            local_prefill_tokens=config.decode.local_prefill_tokens,
            max_in_flight=gateway.max_in_flight,
            max_failovers=gateway.max_failovers,
            timeout_s=gateway.request_timeout_s,
        ),
        times=LinkTimes(heartbeat_s=gateway.heartbeat_timeout_s, step_s=gateway.step_timeout_s),
        slo=config.slo,
    )
