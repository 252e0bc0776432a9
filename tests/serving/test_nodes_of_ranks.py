"""A worker whose ranks lie on different nodes: each listens where its own node is reached. Two
addresses of the loopback network stand for the nodes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster.spec import WorkerSpec
from phasewise.cluster.worker_link import LinkTimes, WorkerLink
from phasewise.configs.schema import (
    KVConfig,
    ModelConfig,
    PrefillConfig,
    SloConfig,
    TransferConfig,
)
from phasewise.engine.request import WorkerId
from phasewise.tests.forked import forked_with_lines
from phasewise.tests.serving.rank_on_node import follow, lead

MODEL = Path(__file__).parents[2] / "models" / "tiny"
LIMIT_S = 100.0
NODES = ("127.0.0.2", "127.0.0.3")
_incarnations = itertools.count(1)


def spec() -> WorkerSpec:
    """Of two ranks, that knows nothing of nodes: where it lies is told as it starts."""
    return WorkerSpec(
        worker=WorkerId(name="prefill-0", incarnation=next(_incarnations)),
        model=ModelConfig(path=MODEL, dtype="float32", max_model_len=256),  # pyright: ignore
        kv=KVConfig(memory=16 << 20),
        transfer=TransferConfig(),
        slo=SloConfig(),
        prefill=PrefillConfig(threads=2, tensor_parallel=2, max_batch_tokens=256),
    )


@contextlib.asynccontextmanager
async def ranks() -> AsyncIterator[str]:
    """Where a worker is reached whose ranks lie on `NODES`."""
    chosen = spec()
    leader, lines = await asyncio.to_thread(forked_with_lines, lead, chosen, NODES[0])
    reader, writer = await asyncio.open_connection(sock=lines)
    door = (await reader.readline()).decode().strip()
    follower, other = await asyncio.to_thread(forked_with_lines, follow, chosen, door, NODES[1])
    try:
        yield (await reader.readline()).decode().strip()
    finally:
        writer.close()
        for process in (leader, follower):
            process.kill()
            await asyncio.to_thread(process.join, LIMIT_S)
        other.close()


def listens(where: str) -> bool:
    host, _, port = where.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5.0):
        return True
    return False


@pytest.mark.slow
def test_every_rank_takes_its_kv_where_its_own_node_is_reached() -> None:
    async def work() -> None:
        async with ranks() as address:
            link = WorkerLink(address, LinkTimes(), time.monotonic)
            await link.connect()
            leaders: Any = link.description.transfer
            (followers,) = leaders.ranks
            assert [where.tcp.rpartition(":")[0] for where in (leaders, followers)] == [*NODES]
            assert listens(leaders.tcp) and listens(followers.tcp)
            await link.close("the test is over")

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
