"""Bytes and messages that arrive changed, cut, twice, late, in another order or never."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.events import Outcome, PeerRefused, PeerUnavailable, Side
from phasewise.kv_transfer.layer_clock import LayerClock

from .harness import LAYOUT, Here, here
from .ledger import Ledger
from .wire import BYTES, FRAMES, Fault, any_fault, wire

CONFIG: dict[str, Any] = {
    "transport": "tcp",
    "checksum": True,
    "small_bytes": 0,
    "silence_s": 0.4,
    "answer_s": 0.4,
    "lease_s": 0.6,
}
SETTLE_S = 30.0  # generous: a hang fails, slowness does not
AT_ONCE = 8
DATA_BYTES = 4 * LAYOUT.num_layers * LAYOUT.block_bytes  # about what a schedule moves
SOURCE = [5, 6, 7]


class Schedule:
    """A prefill worker that meets decode through a wire, pushes one prompt and parks another."""

    def __init__(self, decode: Ledger, prefill: Ledger, fault: Fault | None) -> None:
        self.decode, self.prefill, self.fault = decode, prefill, fault
        self.leases: list[int] = []

    async def push(self, there: TransferAddress) -> None:
        endpoint = self.prefill.worker.endpoint
        lease = self._new_lease()
        try:
            if not await endpoint.ask(there, lease, len(SOURCE)):
                return
        except (PeerUnavailable, PeerRefused):
            return
        finally:
            self.leases.append(lease)
        self.prefill.begun[Side.SENDER, lease] += 1
        clock = LayerClock()
        endpoint.push(lease, SOURCE, 0, clock)
        for layer in range(LAYOUT.num_layers):
            clock.finish(layer)
            await asyncio.sleep(0.002)
        endpoint.commit(lease, 40, 9)

    async def pull(self, back: TransferAddress) -> None:
        endpoint, decode = self.prefill.worker.endpoint, self.decode
        lease = self._new_lease()
        self.leases.append(lease)
        endpoint.park(lease, SOURCE, 40, 9)
        self.prefill.begun[Side.SENDER, lease] += 1
        blocks = decode.take(len(SOURCE))
        try:
            await decode.worker.endpoint.grant(back, lease, blocks, 9)
            decode.hold(lease, blocks)
            await decode.settled(lease, SETTLE_S)
        except (PeerUnavailable, PeerRefused):
            decode.give_back(blocks)
        endpoint.abort(lease)  # of no effect if it was fetched

    def _new_lease(self) -> int:
        lease = self.prefill.worker.endpoint.new_lease()
        self.decode.sent[lease] = self.prefill.worker.pool[:, SOURCE]
        return lease

    async def run(self, there: TransferAddress, back: TransferAddress, push_first: bool) -> bool:
        """Whether the fault came to happen."""
        async with wire(there, self.fault) as (one, to), wire(back, self.fault) as (two, fro):
            moves = [(self.push, to), (self.pull, fro)]
            for move, address in moves if push_first else reversed(moves):
                await move(address)
            for lease in self.leases:
                await self.prefill.settled(lease, SETTLE_S)
                await self.decode.settled(lease, SETTLE_S)
            return one.has_struck or two.has_struck


@asynccontextmanager
async def watched(worker: Here) -> AsyncIterator[Ledger]:
    ledger = Ledger(worker)
    watching = asyncio.create_task(ledger.watch())
    try:
        yield ledger
    finally:
        if watching.done():
            watching.result()  # a law was broken in it
        watching.cancel()


class Campaign:
    """Many schedules against one decode worker, `AT_ONCE` at a time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.struck: Counter[str] = Counter()

    async def run(self, faults: list[Fault]) -> Counter[Outcome]:
        waiting = list(enumerate(faults))
        async with here("decode", 1, CONFIG) as (worker, address), watched(worker) as decode:
            decode.receives()

            async def go_on(name: str) -> None:
                while waiting:
                    number, fault = waiting.pop(0)
                    try:
                        await self._schedule(decode, address, name, number, fault)
                    except (AssertionError, TimeoutError) as error:
                        raise AssertionError(f"schedule {number}, {fault}: {error!r}") from error

            await asyncio.gather(*(go_on(f"p{i}") for i in range(AT_ONCE)))
            assert decode.free == set(range(LAYOUT.num_blocks)), "blocks are missing"
            return decode.outcomes

    async def _schedule(
        self, decode: Ledger, address: TransferAddress, name: str, number: int, fault: Fault
    ) -> None:
        """Every time a newer incarnation of that name."""
        push_first = self.rng.random() < 0.5
        async with (
            here(name, 2, CONFIG, incarnation=number + 1) as (worker, back),
            watched(worker) as prefill,
        ):
            life = Schedule(decode, prefill, fault)
            if await life.run(address, back, push_first):
                self.struck[fault.what] += 1
        await self._serves(decode, address, replace(back.worker, name=f"{name}-clean"))

    async def _serves(self, decode: Ledger, address: TransferAddress, who: WorkerId) -> None:
        """Decode takes KV from others, and has it right; a busy machine may need several tries."""
        async with (
            here(who.name, 3, CONFIG, who.incarnation) as (worker, _),
            watched(worker) as prefill,
            asyncio.timeout(SETTLE_S),
        ):
            life = Schedule(decode, prefill, None)
            while not decode.committed.intersection(life.leases):
                await life.push(address)
                await decode.settled(life.leases[-1], SETTLE_S)


def campaign(seed: int, count: int) -> None:
    one = Campaign(seed)
    kinds = itertools.islice(itertools.cycle(BYTES + FRAMES), count)
    faults = [any_fault(what, one.rng, DATA_BYTES) for what in kinds]
    outcomes = asyncio.run(asyncio.wait_for(one.run(faults), 200))
    assert outcomes[Outcome.COMMITTED] > count, outcomes
    assert sum(outcomes.values()) - outcomes[Outcome.COMMITTED] > count / 10, outcomes
    assert set(one.struck) == {*BYTES, *FRAMES}, one.struck


def test_nothing_wrong_is_committed_over_a_bad_wire() -> None:
    campaign(1, 60)


@pytest.mark.slow
def test_nothing_wrong_is_committed_over_hundreds_of_bad_wires() -> None:
    campaign(2, 220)
