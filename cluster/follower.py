"""One rank above 0 of a worker: computes and transfers its shard as its leader says.

Starts no process and knows nothing of Ray: an actor, a test or a benchmark calls `follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..engine.follower import Follower, build_follower
from ..engine.request import WorkerId
from ..kv_transfer.memory import KVMemory, memory_on
from ..kv_transfer.rank_follower import FollowerEndpoint, RankFollower, StepClocks
from .assembly import held_of, transfer_config
from .spec import WorkerSpec


def follow(spec: WorkerSpec, rank: int, address: str) -> None:
    """Join the leader of worker `spec` at `address` and follow it to its end. Blocks.

    Raises RankLost when a rank is lost, and what keeps the shard from loading.
    """
    memories: list[KVMemory] = []

    def allocate(num_bytes: int) -> Any:
        memories.append(memory_on(spec.pool.device, num_bytes))
        return memories[-1].buffer

    try:
        follower = build_follower(address, rank, allocate)
        layout = follower.rank.cache.layout
        name = f"{spec.worker.name}.{rank}"
        endpoint = FollowerEndpoint(
            WorkerId(name=name, incarnation=spec.worker.incarnation),
            layout,
            memories[0],
            transfer_config(spec, layout),
            held_of(spec, layout, rank),
        )
        asyncio.run(_run(follower, endpoint, rank))
    finally:
        for memory in memories:
            memory.close()


async def _run(follower: Follower, endpoint: FollowerEndpoint, rank: int) -> None:
    """Steps in one thread, transfers on the loop, until either's connection ends."""
    loop = asyncio.get_running_loop()
    clocks = StepClocks(follower.rank.cache.layout.num_layers, endpoint.mark)
    thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
    steps = loop.run_in_executor(thread, follower.run, clocks.begin)
    transfers = loop.create_task(
        RankFollower(endpoint, clocks).run(follower.note["kv"], follower.note["secret"], rank)
    )
    try:
        done, _ = await asyncio.wait([steps, transfers], return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            ended.result()  # raises what broke it
    finally:
        follower.close()
        transfers.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await transfers
        thread.shutdown(wait=True, cancel_futures=True)
