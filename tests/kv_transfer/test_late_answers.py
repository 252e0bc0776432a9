"""Answers that come as their time is up, and pairs that never come to be: nothing is half begun."""

from __future__ import annotations

import asyncio
import time

import pytest
from phasewise.kv_transfer.events import Outcome, PeerUnavailable
from phasewise.kv_transfer.layer_clock import finished_clock

from .harness import CALM, LAYOUT, bounded, here, there
from .wire import Fault, wire

ANSWER_S = 0.4
TCP = {**CALM, "transport": "tcp", "answer_s": ANSWER_S}


@bounded
async def test_a_grant_that_was_here_when_the_loop_woke_too_late_is_a_grant() -> None:
    """It is read and the ask's time is found to be up in one turn of a loop that was held up."""
    async with here("p", 2, TCP) as (p, _), there("decode", 1, TCP) as decode:
        await p.endpoint.connect(decode.address)
        await decode.do("grants", blocks=[[5, 6]])
        lease = p.endpoint.new_lease()
        asking = asyncio.create_task(p.endpoint.ask(decode.address, lease, 2))
        while p.endpoint._senders.get(lease) is None:
            await asyncio.sleep(0)
        time.sleep(ANSWER_S + 0.4)  # noqa: ASYNC251
        granted = await asking
        entry = p.endpoint._senders.get(lease)
        assert granted is (entry is not None), "as the table has it"
        if granted:
            p.endpoint.push(lease, [1, 2], 0, finished_clock(LAYOUT.num_layers))
            p.endpoint.commit(lease, 20, 3)
            assert (await p.ended()).outcome is Outcome.COMMITTED


@bounded
async def test_a_pair_whose_payload_does_not_arrive_is_given_up() -> None:
    swallowed = Fault(what="half silence", is_control=False, to_called=True, at=20, size=1)
    async with (
        here("decode", 1, TCP) as (decode, address),
        here("p", 2, TCP) as (p, _),
        wire(address, swallowed) as (relay, through),
    ):
        with pytest.raises(PeerUnavailable):
            await p.endpoint.connect(through)
        assert relay.has_struck
        async with asyncio.timeout(5):
            while p.endpoint.pairs() or decode.endpoint.pairs():
                await asyncio.sleep(0.02)


@bounded
async def test_a_fetch_that_is_aborted_while_it_looks_for_its_peer_is_not_begun() -> None:
    async with here("decode", 1, TCP) as (decode, _), here("p", 2, TCP) as (p, back):
        lease = p.endpoint.new_lease()
        p.endpoint.park(lease, [4], 9, 0)
        fetching = asyncio.create_task(decode.endpoint.grant(back, lease, [8], 0))
        await asyncio.sleep(0)  # it calls
        assert not decode.endpoint.pairs()
        decode.endpoint.abort(lease)
        with pytest.raises(PeerUnavailable, match="given up"):
            await fetching
        assert await decode.is_quiet(0.1) and await p.is_quiet(0.0)
        await decode.endpoint.grant(back, lease, [8], 0)  # it waits there still
        assert (await decode.ended()).outcome is Outcome.COMMITTED
