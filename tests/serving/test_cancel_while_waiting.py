"""A request that is cancelled while it waits for room on decode leaves nothing on prefill."""

from __future__ import annotations

import asyncio
from pathlib import Path

from phasewise.kv_transfer.events import TransferConfig
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import Cluster, cluster

LIMIT_S = 30.0
BLOCK_BYTES = 3 * 2 * 2 * 10 * 4 * 16  # layers, K and V, heads, head_dim, float32, tokens


async def active_blocks(running: Cluster, role: str) -> int:
    status = await running.client.status()
    return sum(worker.blocks_active for worker in status.workers if worker.role == role)


async def until_active(running: Cluster, role: str, some: bool) -> None:
    """Bounded by the test's own limit, which is less than what is parked may wait."""
    while bool(await active_blocks(running, role)) is not some:
        await asyncio.sleep(0.02)


def test_a_request_cancelled_while_it_waits_for_room_frees_the_prefill_worker(
    tmp_path: Path,
) -> None:
    path = Case("llama", tmp_path).directory

    async def work() -> None:
        options = {"mode": "pull", "num_bytes": 36 * BLOCK_BYTES, "max_model_len": 520}
        async with cluster(path, **options) as running:
            prompt = [5, 6, 7] * 100
            first = running.client.generate(token_ids=prompt, max_tokens=200, ignore_eos=True)
            await anext(first)
            await until_active(running, "decode", True)
            await until_active(running, "prefill", False)
            # 19 blocks are in use: the next prompt's 19 do not fit beside them
            second = running.client.generate(token_ids=prompt[::-1], max_tokens=50)
            await anext(second)
            await until_active(running, "prefill", True)
            await second.aclose()
            await until_active(running, "prefill", False)
            assert await active_blocks(running, "decode") > 0  # the first runs on
            await first.aclose()
            assert await running.leftovers() == {}

    assert TransferConfig().park_s > LIMIT_S
    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
