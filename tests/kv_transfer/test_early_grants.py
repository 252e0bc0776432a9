"""A follower's peer may fetch what its leader has parked before the leader's word is here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer import rank_follower
from phasewise.kv_transfer.events import Ended, Outcome, Released, Side, TransferConfig
from phasewise.kv_transfer.fit import whole
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.messages import Grant
from phasewise.kv_transfer.rank_follower import FollowerEndpoint

from .harness import BOUND_S, LAYOUT, QUICK, Here, bounded, here

BLOCKS = [3, 4, 9]
DIGEST = 77
assert TransferConfig().lease_s < BOUND_S, "what no word ends is seen to expire"


@pytest.fixture(autouse=True)
def long_wait_for_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than any lease: whoever ends before was not held up."""
    monkeypatch.setattr(rank_follower, "EARLY_S", 2 * TransferConfig().lease_s)


@contextlib.asynccontextmanager
async def meeting() -> AsyncIterator[tuple[FollowerEndpoint, Here, TransferAddress]]:
    """A follower with KV in its pool, and a decode worker that knows where it is."""
    memory = PoolMemory(LAYOUT.num_bytes)
    worker = WorkerId(name="p.1", incarnation=1)
    follower = FollowerEndpoint(worker, LAYOUT, memory, TransferConfig(**QUICK), whole(LAYOUT))
    address = await follower.start()
    try:
        async with here("d", 2, QUICK) as (decode, _):
            yield follower, decode, address
    finally:
        await follower.close()
        memory.close()


async def fetch(decode: Here, source: TransferAddress, lease: int, first: int) -> None:
    await decode.endpoint.grant(source, lease, range(first, first + len(BLOCKS)), DIGEST)


async def held(follower: FollowerEndpoint, count: int) -> None:
    """Until so many grants wait for the leader's word."""
    while sum(isinstance(m, Grant) for q in follower._waiting.values() for _, m in q) < count:
        await asyncio.sleep(0.005)  # bounded by the test's own limit


def park(follower: FollowerEndpoint, lease: int) -> None:
    follower.park(lease, BLOCKS, LAYOUT.block_size * len(BLOCKS), DIGEST)


@bounded
async def test_grants_that_come_before_the_parks_and_in_another_order_are_all_served() -> None:
    async with meeting() as (follower, decode, source):
        leases = [follower.new_lease() for _ in range(4)]
        for number, lease in enumerate(reversed(leases)):
            await fetch(decode, source, lease, 8 * number)
        await held(follower, len(leases))
        for lease in leases:
            park(follower, lease)
        ended = [await decode.ended() for _ in leases]
        assert [one.outcome for one in ended] == [Outcome.COMMITTED] * 4, ended


@bounded
async def test_a_held_grant_does_not_look_forgotten_while_others_are_served() -> None:
    async with meeting() as (follower, decode, source):
        early, known = follower.new_lease(), follower.new_lease()
        park(follower, known)
        await fetch(decode, source, early, 0)
        await fetch(decode, source, known, 8)
        await asyncio.sleep(3 * QUICK["silence_s"] / 4)  # beats say what each side knows
        park(follower, early)
        ended = {one.lease: one.outcome for one in [await decode.ended(), await decode.ended()]}
        assert ended == {early: Outcome.COMMITTED, known: Outcome.COMMITTED}


@bounded
async def test_a_grant_whose_receiver_gives_up_meanwhile_is_not_written() -> None:
    async with meeting() as (follower, decode, source):
        lease = follower.new_lease()
        await fetch(decode, source, lease, 0)
        await held(follower, 1)
        decode.endpoint.abort(lease)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        park(follower, lease)
        released = await decode.released()
        assert isinstance(released, Released)
        follower.abort(lease)  # the leader's word, when the request is over
        event = await asyncio.wait_for(anext(follower.events()), BOUND_S)
        assert isinstance(event, Ended)
        assert event.side is Side.SENDER
        assert event.outcome is Outcome.ABORTED


@bounded
async def test_a_grant_of_what_is_never_parked_ends_before_its_lease_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_follower, "EARLY_S", 0.3)
    async with meeting() as (follower, decode, source):
        await fetch(decode, source, follower.new_lease(), 0)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        await decode.released()


@bounded
async def test_a_grant_of_what_is_over_here_is_refused_at_once() -> None:
    async with meeting() as (follower, decode, source):
        lease = follower.new_lease()
        park(follower, lease)
        follower.abort(lease)
        await fetch(decode, source, lease, 0)
        assert (await decode.ended()).outcome is Outcome.ABORTED, "it waited for the leader"
