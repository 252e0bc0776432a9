"""A rank of a worker dies or hangs, and the worker with it: its peer, split differently, keeps the
laws and its blocks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest
from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.events import Asked, Ended, Outcome, PeerUnavailable, Released
from phasewise.kv_transfer.events import Side as Half
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.rank_wire import unpack_address
from phasewise.tests.kv_transfer import rank_process

from .harness import BOUND_S, LAYERED, QUICK, There, at_once, process_of
from .rank_process import AHEAD, NUM_TOKENS, OVER, kv_of, small_spec
from .sides import NUM_BLOCKS, Side, Split

CONFIG: dict[str, Any] = {**LAYERED, **QUICK}
SOURCE = [9, 4, 7, 2]  # 16 tokens each
HERE, THERE = 1, 2  # seeds of what is sent
_incarnations = itertools.count(1)


class Process(There):
    """One rank of the worker that is harmed."""

    def __init__(self, *ends: Any) -> None:
        super().__init__(*ends)
        self.is_doomed = asyncio.Event()

    async def do(self, command: str, **arguments: Any) -> Any:
        """As long as its worker lives; then PeerUnavailable."""
        doing = asyncio.create_task(super().do(command, **arguments))
        doom = asyncio.create_task(self.is_doomed.wait())
        done, pending = await asyncio.wait({doing, doom}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if doing not in done:
            raise PeerUnavailable("the other worker is gone")
        return doing.result()

    async def line(self) -> Any:
        return await asyncio.wait_for(self.answers.get(), BOUND_S)


@asynccontextmanager
async def worker_of_two(transport: str) -> AsyncIterator[list[Process]]:
    """Its leader, who has its address, and its follower; blocks of 16 tokens."""
    setup: dict[str, Any] = {
        "rank": 0,
        "name": "harmed",
        "incarnation": next(_incarnations),
        "tensor": 2,
        "block_size": 16,
        "seed": THERE,
        "blocks": SOURCE,
        "config": {**CONFIG, "transport": transport},
    }
    async with process_of(Process, rank_process.main, setup) as leader:
        door = (await leader.line())["door"]
        setup |= {"rank": 1, "door": door}
        async with process_of(Process, rank_process.main, setup) as follower:
            leader.address = unpack_address((await leader.line())["address"])
            yield [leader, follower]


class Survivor:
    """A worker of one rank or of two, on this loop; its blocks and its leases."""

    def __init__(self, transport: str, split: Split) -> None:
        self.side = Side("survivor", small_spec(), split, {**CONFIG, "transport": transport})
        self.per_lease = NUM_TOKENS // split.block_size
        self.source = list(range(0, 2 * self.per_lease, 2))
        self.side.write(kv_of(HERE), self.source)
        self.free = set(range(NUM_BLOCKS)) - set(self.source)
        self.held: dict[int, list[int]] = {}
        self.begun: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.outcomes: Counter[Outcome] = Counter()
        self.address: TransferAddress

    async def watch(self) -> None:
        while True:
            match await self.side.next():
                case Asked() as asked:
                    self._answer(asked)
                case Released(lease=lease, blocks=blocks):
                    assert self.held.pop(lease) == list(blocks), "released once, and all"
                    self.free |= set(blocks)
                case Ended() as ended:
                    self._end(ended)

    def take(self) -> list[int]:
        return [self.free.pop() for _ in range(self.per_lease)]

    def hold(self, lease: int, blocks: list[int]) -> None:
        self.held[lease] = blocks
        self.begun[lease] += 1

    def _answer(self, asked: Asked) -> None:
        blocks = self.take()
        if self.side.kv.answer(asked, blocks):
            self.hold(asked.lease, blocks)
        else:
            self.free |= set(blocks)

    def _end(self, ended: Ended) -> None:
        self.ended[ended.lease] += 1
        self.outcomes[ended.outcome] += 1
        assert self.ended[ended.lease] == 1, "a lease ends once"
        if ended.side is Half.RECEIVER and ended.outcome is Outcome.COMMITTED:
            blocks = self.held.pop(ended.lease)
            assert (self.side.read(blocks, NUM_TOKENS) == kv_of(THERE)).all(), "wrong KV"
            self.free |= set(blocks)

    async def settled(self) -> None:
        async with asyncio.timeout(BOUND_S):
            while self.ended != self.begun or self.held:
                await asyncio.sleep(0.005)
        assert len(self.free) == NUM_BLOCKS - len(self.source)


@asynccontextmanager
async def survivor(transport: str, split: Split) -> AsyncIterator[Survivor]:
    one = Survivor(transport, split)
    one.address = await one.side.start()
    watching = asyncio.create_task(one.watch())
    try:
        yield one
        assert not watching.done(), watching.result()
    finally:
        watching.cancel()
        await one.side.close()


async def receive(one: Survivor, leader: Process, is_whole: bool) -> None:
    """A lease of the other's, into this worker: pushed, to its end or into the middle."""
    num_blocks = len(SOURCE)
    lease, granted = await leader.do("ask", peer=asdict(one.address), num_blocks=num_blocks)
    if granted:
        await leader.do("push", lease=lease, blocks=SOURCE, layers=3 if is_whole else 2)
        if is_whole:
            await leader.do("commit", lease=lease, num_tokens=NUM_TOKENS, digest=7)


async def fetch(one: Survivor, leader: Process, is_whole: bool) -> None:
    lease = await leader.do("park", blocks=SOURCE, num_tokens=NUM_TOKENS, digest=7)
    blocks = one.take()
    try:
        await one.side.kv.grant(leader.address, lease, blocks, 7 if is_whole else 8)
        one.hold(lease, blocks)
    except PeerUnavailable:
        one.free |= set(blocks)


async def send(one: Survivor, leader: Process, is_whole: bool) -> None:
    kv, lease = one.side.kv, one.side.kv.new_lease()
    await leader.do("grants", blocks=[[11, 3, 5, 12]])
    if not await kv.ask(leader.address, lease, len(one.source), b"", NUM_TOKENS):
        return
    one.begun[lease] += 1
    clock = LayerClock(OVER if is_whole else AHEAD)
    kv.push(lease, one.source, 0, clock)
    for layer in range(3 if is_whole else 1):
        clock.finish(layer)
    if is_whole:
        kv.commit(lease, NUM_TOKENS, 7)


async def end(ranks: list[Process]) -> None:
    """The rest of a worker of which a rank is lost goes too: the engine sees to that."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.signal(signal.SIGKILL)


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
LEADER, FOLLOWER = 0, 1
FAULTS = [
    ("shm", KILL, FOLLOWER),
    ("tcp", STOP, LEADER),
    ("shm", STOP, FOLLOWER),
    ("shm", KILL, LEADER),
    ("tcp", KILL, FOLLOWER),
]


@at_once(fault=FAULTS)
async def test_a_lost_rank_ends_every_lease_of_its_worker_once(
    fault: tuple[str, signal.Signals, int],
) -> None:
    transport, number, victim = fault
    async with (
        survivor(transport, Split(block_size=32)) as one,
        worker_of_two(transport) as ranks,
    ):
        await receive(one, ranks[0], True)
        await fetch(one, ranks[0], True)
        await send(one, ranks[0], True)
        await one.settled()
        assert one.outcomes == {Outcome.COMMITTED: 3}
        await receive(one, ranks[0], False)
        await send(one, ranks[0], False)
        ranks[victim].signal(number)
        async with asyncio.timeout(BOUND_S):
            while one.ended != one.begun:
                await asyncio.sleep(0.005)
        assert one.outcomes[Outcome.COMMITTED] == 3
        await end(ranks)
        await one.settled()
        async with worker_of_two(transport) as ranks:
            await receive(one, ranks[0], True)
            await one.settled()
        assert one.outcomes[Outcome.COMMITTED] == 4


class Life:
    """Some leases with a worker of two, drawn before any begins; doomed, one of its ranks ends
    at any time among them."""

    def __init__(self, one: Survivor, ranks: list[Process], rng: random.Random) -> None:
        self.one, self.ranks = one, ranks
        self.moves = [rng.choice([receive, fetch, send]) for _ in range(rng.randint(1, 4))]
        self.is_whole = [index > 0 and rng.random() < 0.6 for index in range(len(self.moves))]
        self.delay_s = rng.random() * 0.1
        self.number = rng.choice([signal.SIGKILL, signal.SIGSTOP])
        self.victim = rng.choice(ranks)
        self.unseen_s = rng.choice([0.0, 0.1, 1.3 * CONFIG["silence_s"]])  # by the engine

    async def healthy(self) -> None:
        for move in self.moves:
            await move(self.one, self.ranks[0], True)
        await self.one.settled()

    async def doomed(self) -> None:
        dying = asyncio.create_task(self._die())
        for move, is_whole in zip(self.moves, self.is_whole, strict=True):
            with contextlib.suppress(PeerUnavailable, OSError):  # it may be dead
                await move(self.one, self.ranks[0], is_whole)
        await dying
        await self.one.settled()

    async def _die(self) -> None:
        await asyncio.sleep(self.delay_s)
        self.victim.signal(self.number)
        await asyncio.sleep(self.unseen_s)
        await end(self.ranks)
        self.ranks[0].is_doomed.set()


async def campaign(transport: str, split: Split, seed: int, workers: int) -> Counter[Outcome]:
    """Every worker lives well once, and then badly."""
    rng = random.Random(seed)
    async with survivor(transport, split) as one:
        for _ in range(workers):
            async with worker_of_two(transport) as ranks:
                await Life(one, ranks, rng).healthy()
                await Life(one, ranks, rng).doomed()
        return one.outcomes


@pytest.mark.slow
@at_once(
    seed=[3, 4], ways=[("shm", Split(block_size=32)), ("tcp", Split(pipeline=2, block_size=8))]
)
async def test_a_survivor_keeps_the_laws_over_random_lives_of_workers_of_two(
    seed: int, ways: tuple[str, Split]
) -> None:
    outcomes = await campaign(*ways, seed, 3)
    assert outcomes[Outcome.COMMITTED] >= 3, outcomes
    assert sum(outcomes.values()) > outcomes[Outcome.COMMITTED], outcomes
