"""A writer that is slow, but not dead: its lease lives while it moves, and its blocks are its own
until it is out of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from phasewise.kv_transfer.events import Outcome
from phasewise.kv_transfer.layer_clock import LayerClock, finished_clock

from .harness import LAYERED, LAYOUT, QUICK, Here, at_once, here, pool_bytes

TRANSPORTS = ["shm", "tcp"]
SOURCE, TARGET = [1, 2, 3], [20, 21, 22]
LAYER_S = 0.25  # of a writer that is paced: all four at once, as they are ready together
PACE = len(SOURCE) * LAYOUT.block_bytes / LAYER_S


@asynccontextmanager
async def granted(transport: str, **config: Any) -> AsyncIterator[tuple[Here, Here, int]]:
    """A lease of TARGET, before anything is written."""
    chosen = {**LAYERED, **QUICK, "transport": transport, **config}
    async with here("decode", 1, chosen) as (decode, address), here("p", 2, chosen) as (p, _):
        lease = p.endpoint.new_lease()
        asking = asyncio.create_task(p.endpoint.ask(address, lease, len(SOURCE)))
        assert decode.endpoint.answer(await decode.asked(), TARGET)
        assert await asking
        yield decode, p, lease


@at_once(transport=TRANSPORTS)
async def test_a_lease_outlives_its_time_as_long_as_layers_come(transport: str) -> None:
    rest_s = 2.0
    async with granted(transport, lease_s=rest_s) as (decode, p, lease):
        clock = LayerClock()
        p.endpoint.push(lease, SOURCE, 0, clock)
        for layer in range(LAYOUT.num_layers):  # longer in all than the lease may rest
            await asyncio.sleep(rest_s / 3)
            clock.finish(layer)
        p.endpoint.commit(lease, 40, 7)
        assert (await decode.ended()).outcome is Outcome.COMMITTED
        assert (await p.ended()).outcome is Outcome.COMMITTED
        assert np.array_equal(decode.pool[:, TARGET], pool_bytes(2)[:, SOURCE])


@at_once(transport=TRANSPORTS, by=["decode", "prefill"])
async def test_blocks_of_a_lease_given_up_in_mid_write_are_not_written_after_their_release(
    transport: str, by: str
) -> None:
    async with granted(transport, pace_bytes_per_s=PACE) as (decode, p, lease):
        p.endpoint.push(lease, SOURCE, 0, finished_clock(LAYOUT.num_layers))
        await asyncio.sleep(LAYER_S)
        (decode if by == "decode" else p).endpoint.abort(lease)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == tuple(TARGET)
        decode.pool[:, TARGET] = 7  # another request's from now on
        assert (await p.ended()).blocks == tuple(SOURCE)
        await asyncio.sleep(LAYOUT.num_layers * LAYER_S)  # what was under way is over by now
        assert (decode.pool[:, TARGET] == 7).all()


@at_once(transport=TRANSPORTS)
async def test_a_write_that_outlasts_its_lease_ends_it_once_and_writes_nothing_later(
    transport: str,
) -> None:
    """The copier is stuck in one layer for longer than the lease allows."""
    async with granted(transport, pace_bytes_per_s=PACE, lease_s=LAYER_S / 2) as one:
        decode, p, lease = one
        p.endpoint.push(lease, SOURCE, 0, finished_clock(LAYOUT.num_layers))
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.EXPIRED)
        assert (await decode.released()).blocks == tuple(TARGET)
        decode.pool[:, TARGET] = 7
        assert (await p.ended()).outcome is Outcome.EXPIRED
        await asyncio.sleep(LAYOUT.num_layers * LAYER_S)
        assert (decode.pool[:, TARGET] == 7).all()
        assert await decode.is_quiet(0.0) and await p.is_quiet(0.0)
