"""KV that a decode worker cannot fetch, or will not, is not left waiting in the prefill pool."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from phasewise.decode_worker.incoming import Inbox
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import Request, SamplingParams, TransferAddress, WorkerId
from phasewise.engine.sequence import Sequence
from phasewise.kv_transfer.digest import token_digest
from phasewise.kv_transfer.events import Asked, Ended, TransferConfig
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.rank_endpoint import RankEndpoint
from phasewise.prefill_worker.outgoing import Outbox
from phasewise.tests.kv_transfer.harness import LAYOUT, QUICK, There, bounded, there

CONFIG: dict[str, Any] = {**QUICK, "transport": "tcp", "answer_s": 1.0}
PROMPT = (5, 6, 7)


@asynccontextmanager
async def endpoint(
    name: str, layout: KVLayout = LAYOUT
) -> AsyncIterator[tuple[RankEndpoint, TransferAddress]]:
    memory = PoolMemory(layout.num_bytes)
    worker = WorkerId(name=name, incarnation=1)
    kv = RankEndpoint(worker, layout, memory, TransferConfig(**CONFIG))
    try:
        yield kv, await kv.start()
    finally:
        await kv.close()
        memory.close()


def inbox(kv: RankEndpoint) -> Inbox:
    limits = DecodeLimits(max_batch_size=8, max_batch_tokens=128, max_model_len=500)
    scheduler = DecodeScheduler(BlockAllocator(LAYOUT.num_blocks, LAYOUT.block_size), limits)
    size = LAYOUT.block_size
    return Inbox(scheduler, kv, block_size=size, orphan_s=60.0, clock=time.monotonic)


def sequence(name: str) -> Sequence:
    sampling = SamplingParams(max_tokens=8)
    return Sequence(Request(id=name, token_ids=PROMPT, num_prompt_tokens=3, sampling=sampling))


async def parked(p: There) -> int:
    """The prompt's KV, at a prefill worker that answers nobody from now on."""
    digest = token_digest(PROMPT)
    lease = await p.do("park", blocks=[1], num_tokens=len(PROMPT), digest=digest)
    p.signal(signal.SIGSTOP)
    return lease


def resumed(box: Inbox, p: There, lease: int) -> Sequence:
    handed = sequence("r")
    handed.append(9)
    box.resume(handed, lease=lease, granted=False, source=p.address)
    box.fetch()
    return handed


async def discarded(p: There, lease: int) -> None:
    p.signal(signal.SIGCONT)
    ended = await p.event("Ended")
    assert (ended["lease"], ended["outcome"]) == (lease, "aborted")


@bounded
async def test_kv_that_could_not_be_fetched_is_discarded() -> None:
    async with endpoint("decode") as (kv, _), there("prefill", 2, CONFIG) as p:
        box = inbox(kv)
        lease = await parked(p)
        resumed(box, p, lease)
        while not box.news.lost:
            await asyncio.sleep(0.01)
        assert box.scheduler.load().blocks.leased == 0
        await discarded(p, lease)


@bounded
async def test_a_request_that_is_cancelled_while_its_fetch_fails_leaves_nothing_parked() -> None:
    async with endpoint("decode") as (kv, _), there("prefill", 2, CONFIG) as p:
        box = inbox(kv)
        lease = await parked(p)
        handed = resumed(box, p, lease)
        await asyncio.sleep(0.05)  # the fetch calls, and nobody answers
        assert box.abort(handed.id)
        while len(box):
            await asyncio.sleep(0.01)
        assert box.scheduler.load().blocks.leased == 0
        await discarded(p, lease)


async def answer_nobody(kv: RankEndpoint) -> Asked:
    async for event in kv.events():
        if isinstance(event, Asked):
            return event
    raise AssertionError("nobody asked")


async def first_end(kv: RankEndpoint) -> Ended:
    async for event in kv.events():
        if isinstance(event, Ended):
            return event
    raise AssertionError("nothing ended")


@bounded
async def test_kv_that_was_asked_for_in_vain_is_parked_under_another_lease() -> None:
    """Decode may have granted the first one, and would wait for that instead of fetching."""
    async with endpoint("decode") as (decode, address), endpoint("prefill") as (prefill, back):
        outbox = Outbox(prefill, LAYOUT, mode="push", clock=time.monotonic)
        prompt = sequence("r")
        prompt.blocks = [3]
        outbox.begin(prompt, address, [], 0)
        outbox.chunk(prompt, 0, len(PROMPT), LayerClock())
        asked = await answer_nobody(decode)
        while outbox._by_id["r"].asking is not None:
            await asyncio.sleep(0.01)
        prompt.num_computed = len(PROMPT)
        outgoing = outbox.finish(prompt)
        assert not outgoing.granted and outgoing.lease != asked.lease
        await decode.grant(back, outgoing.lease, [7], token_digest(PROMPT))
        assert (await first_end(prefill)).lease == outgoing.lease
        assert outbox.ended(outgoing.lease) is prompt and not len(outbox)
