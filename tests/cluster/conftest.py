"""A gateway and fake workers on one event loop, on ports that the system picks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.router import RouterLimits
from phasewise.cluster.served_model import ServedModel
from phasewise.cluster.worker_link import LinkTimes
from phasewise.tests.cluster.fake_worker import VOCAB, FakeWorker

LIMIT_S = 60.0


@pytest.fixture
def run() -> Callable[[Any], Any]:
    """Run a coroutine on a loop of its own, in bounded time."""
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


@pytest.fixture
def serving() -> Any:
    """`async with serving(prefill=1, decode=1) as (gateway, prefills, decodes)`."""

    @asynccontextmanager
    async def open_gateway(
        *,
        prefill: int = 1,
        decode: int = 1,
        served: ServedModel | None = None,
        http: bool = False,
        step_s: float = 0.002,
        heartbeat_s: float = 10.0,
        abort_s: float = 30.0,
        **limits: Any,
    ) -> AsyncIterator[tuple[Gateway, list[FakeWorker], list[FakeWorker]]]:
        settings = GatewaySettings(
            grpc_address="127.0.0.1:0",
            http_address="127.0.0.1:0" if http else None,
            router=RouterLimits(**limits),
            times=LinkTimes(heartbeat_s=heartbeat_s, abort_s=abort_s),
        )
        served = served or ServedModel(name="fake", vocab_size=VOCAB, max_model_len=512)
        gateway = Gateway(served, settings)
        prefills = [FakeWorker("prefill", f"prefill-{i}", step_s=step_s) for i in range(prefill)]
        decodes = [FakeWorker("decode", f"decode-{i}", step_s=step_s) for i in range(decode)]
        async with AsyncExitStack() as stack:
            for worker in (*prefills, *decodes):
                await worker.start()
                stack.push_async_callback(worker.stop)
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            for worker in (*prefills, *decodes):
                gateway.add_worker(worker.address, worker.role)
            await gateway.wait_ready(30)
            yield gateway, prefills, decodes

    return open_gateway
