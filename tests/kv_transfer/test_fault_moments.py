"""One peer is lost while its leases stand at every point of their lives: each ends once, nothing
that was not all there is called done, every block comes back, and others are served."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import numpy as np
from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.events import Asked, Ended, Outcome, Released
from phasewise.kv_transfer.layer_clock import LayerClock

from .harness import (
    BOUND_S,
    LAYERED,
    LAYOUT,
    QUICK,
    Here,
    There,
    at_once,
    here,
    pool_bytes,
    there,
)

CONFIG = {**LAYERED, **QUICK}
STOP, KILL = signal.SIGSTOP, signal.SIGKILL
moments = at_once(transport=["shm", "tcp", "gloo"], number=[KILL, STOP])
LAYERS = range(LAYOUT.num_layers + 1)  # computed when it happens; all of them: before the commit
HERE, THERE = 1, 2  # seeds of the pools
SOURCE = [1, 2, 3]


def blocks_of(index: int) -> list[int]:
    return [4 * index + 1, 4 * index + 3, 4 * index + 2]


class Fates:
    """What became of the survivor's leases."""

    def __init__(self, worker: Here, address: TransferAddress) -> None:
        self.worker, self.address = worker, address
        self.ended: dict[int, Ended] = {}
        self.released: dict[int, tuple[int, ...]] = {}
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()

    async def watch(self) -> None:
        async for event in self.worker.stream:
            match event:
                case Asked():
                    self.asked.put_nowait(event)
                case Ended():
                    assert event.lease not in self.ended, "a lease ends once"
                    self.ended[event.lease] = event
                case Released():
                    assert event.lease not in self.released, "and is released once"
                    self.released[event.lease] = event.blocks

    async def all_ended(self, leases: list[int]) -> None:
        while not self.ended.keys() >= set(leases):  # bounded by the test's own limit
            await asyncio.sleep(0.005)

    async def all_released(self, leases: list[int]) -> None:
        while not self.released.keys() >= set(leases):
            await asyncio.sleep(0.005)


@asynccontextmanager
async def survivor(name: str, seed: int, transport: str) -> AsyncIterator[Fates]:
    async with here(name, seed, {**CONFIG, "transport": transport}) as (worker, address):
        fates = Fates(worker, address)
        watching = asyncio.create_task(fates.watch())
        try:
            yield fates
        finally:
            if watching.done():
                watching.result()
            watching.cancel()


async def serves_others(fates: Fates, transport: str) -> None:
    """It takes KV from somebody else, and gives some."""
    endpoint = fates.worker.endpoint
    async with survivor("other", 5, transport) as other:
        theirs, mine = other.worker.endpoint.new_lease(), endpoint.new_lease()
        other.worker.endpoint.park(theirs, [30], 9, 1)
        await endpoint.grant(other.address, theirs, [60], 1)
        endpoint.park(mine, [61], 9, 1)
        await other.worker.endpoint.grant(fates.address, mine, [40], 1)
        for one in (fates, other):
            await one.all_ended([theirs, mine])
            assert one.ended[theirs].outcome is one.ended[mine].outcome is Outcome.COMMITTED
        assert np.array_equal(fates.worker.pool[:, 60], pool_bytes(5)[:, 30])
        assert np.array_equal(other.worker.pool[:, 40], fates.worker.pool[:, 61])


async def granted_here(fates: Fates, p: There, index: int) -> int:
    """A lease of the process's, into this pool."""
    asking = asyncio.create_task(p.do("ask", peer=asdict(fates.address), num_blocks=3))
    assert fates.worker.endpoint.answer(await fates.asked.get(), blocks_of(index))
    lease, granted = await asking
    assert granted
    return lease


@moments
async def test_a_sender_is_lost_with_leases_at_every_point(
    transport: str, number: signal.Signals
) -> None:
    config = {**CONFIG, "transport": transport}
    async with (
        survivor("decode", HERE, transport) as fates,
        there("prefill", THERE, config) as p,
    ):
        committed = await granted_here(fates, p, len(LAYERS))
        await p.do("push", lease=committed, blocks=SOURCE, first=0, layers=LAYOUT.num_layers)
        await p.do("commit", lease=committed, num_tokens=40, digest=7)
        await fates.all_ended([committed])
        leases = [await granted_here(fates, p, index) for index in LAYERS]
        for layers, lease in zip(LAYERS, leases, strict=True):
            await p.do("push", lease=lease, blocks=SOURCE, first=0, layers=layers)
        asking = asyncio.create_task(p.do("ask", peer=asdict(fates.address), num_blocks=3))
        asked = await fates.asked.get()  # before its grant
        p.signal(number)
        await fates.all_ended(leases)
        asking.cancel()
        assert fates.worker.endpoint.answer(asked, [50, 51, 52]) is False
        assert {fates.ended[lease].outcome for lease in leases} == {Outcome.LOST}
        if number is STOP and transport == "shm":
            assert not fates.released, "a hung writer may write when it wakes"
        await serves_others(fates, transport)
        if number is STOP:
            p.signal(KILL)
        await fates.all_released(leases)
        given_back = {lease: tuple(blocks_of(index)) for index, lease in enumerate(leases)}
        assert fates.released == given_back
        assert fates.ended[committed].outcome is Outcome.COMMITTED
        arrived = fates.worker.pool[:, blocks_of(len(LAYERS))]
        assert np.array_equal(arrived, pool_bytes(THERE)[:, SOURCE])


async def granted_there(fates: Fates, decode: There, index: int) -> int:
    """A lease of this worker's, into the process's pool."""
    await decode.do("grants", blocks=[blocks_of(index)])
    lease = fates.worker.endpoint.new_lease()
    assert await fates.worker.endpoint.ask(decode.address, lease, 3)
    return lease


def push(fates: Fates, lease: int, layers: int) -> None:
    clock = LayerClock()
    fates.worker.endpoint.push(lease, SOURCE, 0, clock)
    for layer in range(layers):
        clock.finish(layer)


async def has_asked(decode: There, times: int) -> None:
    while times:
        times -= (await asyncio.wait_for(decode.events.get(), BOUND_S))["event"] == "Asked"


@moments
async def test_a_receiver_is_lost_with_leases_at_every_point(
    transport: str, number: signal.Signals
) -> None:
    config = {**CONFIG, "transport": transport}
    async with (
        survivor("prefill", HERE, transport) as fates,
        there("decode", THERE, config) as decode,
    ):
        endpoint = fates.worker.endpoint
        committed = await granted_there(fates, decode, len(LAYERS))
        push(fates, committed, LAYOUT.num_layers)
        endpoint.commit(committed, 40, 7)
        await fates.all_ended([committed])
        leases = [await granted_there(fates, decode, index) for index in LAYERS]
        for layers, lease in zip(LAYERS, leases, strict=True):
            push(fates, lease, layers)
        asked = endpoint.new_lease()
        asking = asyncio.create_task(endpoint.ask(decode.address, asked, 3))
        await has_asked(decode, len(LAYERS) + 2)  # and nobody answers
        decode.signal(STOP)
        endpoint.commit(leases[-1], 40, 7)  # to one that does not hear it
        decode.signal(number)
        await fates.all_ended(leases)
        assert {fates.ended[lease].outcome for lease in leases} == {Outcome.LOST}
        assert {fates.ended[lease].blocks for lease in leases} == {tuple(SOURCE)}
        assert fates.ended[committed].outcome is Outcome.COMMITTED
        assert await asking is False
        await serves_others(fates, transport)
        assert asked not in fates.ended and not fates.released
        if number is STOP:
            await wakes_and_is_right(fates, decode, leases)


async def wakes_and_is_right(fates: Fates, decode: There, leases: list[int]) -> None:
    """One that slept may find its last lease all there, word and bytes; nothing else."""
    expected = hashlib.sha256(fates.worker.pool[:, SOURCE].tobytes()).hexdigest()
    decode.signal(signal.SIGCONT)
    ends: dict[int, str] = {}
    while ends.keys() < set(leases):
        event = await asyncio.wait_for(decode.events.get(), BOUND_S)
        if event["event"] == "Ended":
            assert event["lease"] not in ends, "a lease ends once"
            ends[event["lease"]] = event["outcome"]
            if event["outcome"] == "committed":
                assert await decode.do("digest", blocks=event["blocks"]) == expected
    assert {ends[lease] for lease in leases[:-1]} == {"lost"}
