"""Random lives of two workers, one of them a process that is killed, stopped or made to fail.

Every lease that begins on the survivor ends once; what is committed is right byte by byte; every
block comes back, and the next schedule is served by the same survivor.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.events import Asked, Ended, Outcome, PeerUnavailable, Released, Side
from phasewise.kv_transfer.layer_clock import LayerClock

from .harness import LAYOUT, Here, There, at_once, here, pool_bytes, there

NUM_LAYERS, NUM_BLOCKS = LAYOUT.num_layers, LAYOUT.num_blocks
CONFIG: dict[str, Any] = {"checksum": True, "silence_s": 1.0, "small_bytes": 0, "answer_s": 1.0}
FAULTS = ["none", "none", "kill", "stop", "stop and kill", "abort here", "abort there", "fail"]
BOUND_S = 30.0  # of one schedule
HERE, THERE = 1, 2  # seeds of the pools


class Survivor:
    """The endpoint in this process, and what becomes of its leases."""

    def __init__(self, worker: Here, address: TransferAddress, rng: random.Random) -> None:
        self.worker, self.address, self.rng = worker, address, rng
        self.free = set(range(NUM_BLOCKS))
        self.held: dict[int, tuple[int, ...]] = {}  # blocks of leases into this pool
        self.sources: dict[int, list[int]] = {}  # what the sender pushes, by lease
        self.begun: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.outcomes: Counter[tuple[Side, Outcome]] = Counter()

    async def watch(self) -> None:
        async for event in self.worker.stream:
            if isinstance(event, Asked):
                self.answer(event)
            elif isinstance(event, Released):
                assert self.held.pop(event.lease) == event.blocks, "released once, and all"
                self.free |= set(event.blocks)
            else:
                self.end(event)

    def answer(self, asked: Asked) -> None:
        if self.rng.random() < 0.1:
            return  # before the grant: nobody ever answers
        blocks = self.take(asked.num_blocks) if self.rng.random() < 0.9 else None
        if self.worker.endpoint.answer(asked, blocks) and blocks is not None:
            self.hold(asked.lease, blocks)
        else:
            self.free |= set(blocks or ())

    def take(self, count: int) -> list[int]:
        blocks = self.rng.sample(sorted(self.free), count)
        self.free -= set(blocks)
        return blocks

    def hold(self, lease: int, blocks: list[int]) -> None:
        self.held[lease] = tuple(blocks)
        self.begun[lease] += 1

    def end(self, ended: Ended) -> None:
        self.ended[ended.lease] += 1
        self.outcomes[ended.side, ended.outcome] += 1
        if ended.side is Side.RECEIVER and ended.outcome is Outcome.COMMITTED:
            blocks = self.held.pop(ended.lease)
            expected = pool_bytes(THERE)[:, self.sources[ended.lease]]
            assert np.array_equal(self.worker.pool[:, list(blocks)], expected), "wrong KV"
            self.worker.pool[:, list(blocks)] = 0
            self.free |= set(blocks)

    async def settled(self) -> None:
        """Every lease that began has ended and given its blocks back."""
        while self.ended != self.begun or self.held:
            assert not self.ended - self.begun, "a lease ended twice, or never began"
            await asyncio.sleep(0.005)
        assert self.free == set(range(NUM_BLOCKS))


class Life:
    """One schedule: some leases, and one thing that goes wrong at some point of one of them."""

    def __init__(self, survivor: Survivor, peer: There) -> None:
        self.survivor, self.peer, self.rng = survivor, peer, survivor.rng
        self.fault = self.rng.choice(FAULTS)
        self.countdown = self.rng.randrange(12)  # steps until it happens
        self.over = False  # the peer takes no more commands
        self.pushing: list[int] = []

    async def step(self, command: str, **arguments: Any) -> Any:
        """A command to the peer, unless its end has come."""
        await self.tick()
        return None if self.over else await self.peer.do(command, **arguments)

    async def tick(self) -> None:
        self.countdown -= 1
        if self.countdown != 0 or self.over:
            return
        if self.fault in ("kill", "stop", "stop and kill"):
            self.over = True
            self.peer.signal(signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
        for lease in self.pushing[-1:]:
            if self.fault == "abort here":
                self.survivor.worker.endpoint.abort(lease)
            elif self.fault == "abort there":
                await self.peer.do("abort", lease=lease)

    async def finish(self) -> bool:
        """Whether the peer can go on."""
        if self.fault == "stop" and self.over:
            await asyncio.sleep(2 * self.rng.random())  # found out by then, or not
            self.peer.signal(signal.SIGCONT)
            await self.survivor.settled()
            return False
        if self.fault == "stop and kill" and self.over:
            await asyncio.sleep(2 * self.rng.random())
            self.peer.signal(signal.SIGKILL)
        await self.survivor.settled()
        return not self.over


async def receive(life: Life) -> None:
    """The survivor is decode: one lease, pushed to it or fetched by it."""
    survivor, rng = life.survivor, life.rng
    source = rng.sample(range(NUM_BLOCKS), rng.randint(1, 4))
    if rng.random() < 0.4:
        lease = await life.step("park", blocks=source, num_tokens=40, digest=9)
        if lease is None:
            return
        survivor.sources[lease] = source
        blocks = survivor.take(len(source))
        try:
            await survivor.worker.endpoint.grant(life.peer.address, lease, blocks, 9)
            survivor.hold(lease, blocks)
        except PeerUnavailable:
            survivor.free |= set(blocks)
        life.pushing.append(lease)
        await life.tick()
        return
    peer = asdict(survivor.address)
    answer = await life.step("ask", peer=peer, num_blocks=len(source))
    if answer is None or not answer[1]:
        return
    lease = answer[0]
    survivor.sources[lease] = source
    life.pushing.append(lease)
    layers = rng.randint(0, NUM_LAYERS)
    await life.step("push", lease=lease, blocks=source, first=0, layers=layers)
    if life.fault == "fail" and layers < NUM_LAYERS:
        await life.step("fail", lease=lease)
        return
    await life.step("layers", lease=lease, layers=NUM_LAYERS)
    await life.step("commit", lease=lease, num_tokens=40, digest=9)


async def send(life: Life) -> None:
    """The survivor is prefill: one lease, pushed by it or fetched from it."""
    survivor, rng = life.survivor, life.rng
    endpoint = survivor.worker.endpoint
    source = rng.sample(range(NUM_BLOCKS), rng.randint(1, 4))
    target = rng.sample(range(NUM_BLOCKS), len(source))
    lease = endpoint.new_lease()
    life.pushing.append(lease)
    if rng.random() < 0.4:
        endpoint.park(lease, source, 40, 9)
        survivor.begun[lease] += 1
        address = asdict(survivor.address)
        await life.step("fetch", peer=address, lease=lease, blocks=target, digest=9)
        await life.tick()
        if life.over:
            endpoint.abort(lease)  # parked still, or being fetched: its one end either way
        return
    await life.step("grants", blocks=[target if rng.random() < 0.9 else []])
    try:
        granted = await endpoint.ask(life.peer.address, lease, len(source))
    except PeerUnavailable:
        return
    if not granted:
        return
    survivor.begun[lease] += 1
    clock = LayerClock()
    endpoint.push(lease, source, 0, clock)
    for layer in range(NUM_LAYERS):
        await life.tick()
        if life.fault == "fail" and layer == 2:
            clock.fail()
            return
        clock.finish(layer)
    await life.tick()
    endpoint.commit(lease, 40, 9)
    await life.tick()


async def campaign(side: Side, transport: str, seed: int, schedules: int) -> Counter[Any]:
    rng = random.Random(seed)
    config = {**CONFIG, "transport": transport}
    move = receive if side is Side.RECEIVER else send
    async with here("survivor", HERE, config) as (worker, address):
        survivor = Survivor(worker, address, rng)
        watching = asyncio.create_task(survivor.watch())
        left, incarnation = schedules, 0
        while left > 0:
            incarnation += 1
            async with there("peer", THERE, config, incarnation=incarnation) as peer:
                alive = True
                while alive and left > 0:
                    left -= 1
                    async with asyncio.timeout(BOUND_S):
                        life = Life(survivor, peer)
                        for _ in range(rng.randint(1, 4)):
                            await move(life)
                        alive = await life.finish()
                    assert not watching.done(), watching.result()
        watching.cancel()
    return survivor.outcomes


CAMPAIGNS = [("shm", 1, 20), ("shm", 2, 20), ("shm", 3, 20), ("gloo", 4, 13), ("gloo", 5, 13)]
CAMPAIGNS += [("tcp", seed, schedules) for _, seed, schedules in CAMPAIGNS[:3]]


@pytest.mark.slow
@at_once(side=list(Side), chosen=CAMPAIGNS)
async def test_a_survivor_keeps_the_laws_over_dozens_of_random_lives(
    side: Side, chosen: tuple[str, int, int]
) -> None:
    outcomes = await campaign(side, *chosen)
    assert outcomes[side, Outcome.COMMITTED] > chosen[2] / 4, outcomes
    failed = sum(count for (_, outcome), count in outcomes.items() if outcome != "committed")
    assert failed > 0, outcomes
