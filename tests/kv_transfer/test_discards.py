"""Nobody will fetch what is parked, and its owner hears so, whatever happens on the way."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

import pytest
from phasewise.kv_transfer.events import Ended, Outcome, PeerUnavailable, TransferConfig
from phasewise.kv_transfer.pair import Life

from .harness import BOUND_S, QUICK, Here, bounded, here, there
from .rank_process import small_spec
from .sides import Side, Split, sides

every = pytest.mark.parametrize("transport", ["shm", "tcp"])
assert TransferConfig().park_s > BOUND_S, "what no discard reaches outlasts every wait here"


def _break(worker: Here) -> None:
    """Its end of its pair is over; the other end has not heard."""
    (pair,) = worker.endpoint._board.pairs.values()
    worker.endpoint._board.fault(pair, "the test breaks it")


@every
@bounded
async def test_a_peer_that_did_not_answer_hears_of_a_discard_when_it_does(transport: str) -> None:
    config = {**QUICK, "transport": transport, "answer_s": 1.0}
    async with here("decode", 1, config) as (decode, _), there("prefill", 2, config) as p:
        lease = await p.do("park", blocks=[1, 2, 3], num_tokens=48, digest=5)
        p.signal(signal.SIGSTOP)
        decode.endpoint.discard(p.address, lease)
        while not decode.endpoint.counters().get("call failed"):
            await asyncio.sleep(0.01)
        p.signal(signal.SIGCONT)
        ended = await p.event("Ended")
        assert (ended["lease"], ended["outcome"], ended["blocks"]) == (lease, "aborted", [1, 2, 3])


@every
@bounded
async def test_discards_that_a_breaking_pair_swallows_are_told_again(transport: str) -> None:
    config = {**QUICK, "transport": transport}
    async with here("decode", 1, config) as (decode, _), here("p", 2, config) as (p, back):
        await decode.endpoint.connect(back)
        leases = [p.endpoint.new_lease() for _ in range(3)]
        for block, lease in enumerate(leases):
            p.endpoint.park(lease, [block], 9, 0)
        _break(p)
        (pair,) = decode.endpoint._board.pairs.values()
        assert pair.is_ready
        for lease in leases:
            decode.endpoint.discard(back, lease)
        ends = [await p.ended() for _ in leases]
        assert {ended.lease for ended in ends} == set(leases)
        assert {ended.outcome for ended in ends} == {Outcome.ABORTED}
        assert pair.life is not Life.OPEN
        assert not decode.endpoint.counters().get("discard not delivered")


@every
@bounded
async def test_a_fetch_that_the_sender_never_saw_leaves_nothing_parked(transport: str) -> None:
    config = {**QUICK, "transport": transport}
    async with here("decode", 1, config) as (decode, _), here("p", 2, config) as (p, back):
        await decode.endpoint.connect(back)
        lease = p.endpoint.new_lease()
        p.endpoint.park(lease, [4], 9, 0)
        _break(p)
        await decode.endpoint.grant(back, lease, [8], 0)
        assert (await decode.ended()).outcome is Outcome.LOST
        ended = await p.ended()
        assert (ended.lease, ended.outcome, ended.blocks) == (lease, Outcome.ABORTED, (4,))
        assert (await decode.released()).blocks == (8,)


@bounded
async def test_a_discard_for_an_incarnation_that_was_replaced_is_given_up() -> None:
    async with here("decode", 1, QUICK) as (decode, _):
        async with here("p", 2, QUICK) as (_, gone):
            await decode.endpoint.connect(gone)
        async with here("p", 2, QUICK, incarnation=2) as (_, back):
            await decode.endpoint.connect(back)
            decode.endpoint.discard(gone, 5)
            while not decode.endpoint.counters().get("discard not delivered"):
                await asyncio.sleep(0.01)


async def _ended(side: Side) -> Ended:
    event = await side.next()
    assert isinstance(event, Ended), event
    return event


@bounded
async def test_a_rank_whose_part_nobody_fetched_is_told_though_its_leaders_part_was_sent() -> None:
    """Decode's second rank finds its counterpart silent while the leaders exchange theirs."""
    config = {**QUICK, "transport": "tcp", "answer_s": 1.0}
    split = Split(tensor=2)
    async with sides(small_spec(), split, split, config) as (prefill, decode, source, _):
        lease, blocks = prefill.kv.new_lease(), [4, 3]
        prefill.kv.park(lease, blocks, 30, 7)
        silent = await asyncio.start_server(lambda *_: asyncio.sleep(BOUND_S), "127.0.0.1", 0)
        async with silent:
            port = silent.sockets[0].getsockname()[1]
            rank = replace(source.ranks[0], tcp=f"127.0.0.1:{port}")
            board = decode.endpoints[1]._board
            for pair in list(board.pairs.values()):
                board.fault(pair, "the test breaks it")
            await decode.kv.grant(replace(source, ranks=(rank,)), lease, [8, 9], 7)
            assert (await _ended(decode)).outcome is Outcome.LOST
            ended = await _ended(prefill)
            assert (ended.lease, ended.blocks) == (lease, tuple(blocks))
            assert ended.outcome is not Outcome.COMMITTED


@bounded
async def test_a_grant_that_reaches_nobody_leaves_the_lease_for_a_discard() -> None:
    config = {**QUICK, "transport": "tcp", "answer_s": 1.0}
    async with here("decode", 1, config) as (decode, _), there("prefill", 2, config) as p:
        lease = await p.do("park", blocks=[1], num_tokens=9, digest=5)
        p.signal(signal.SIGSTOP)
        with pytest.raises(PeerUnavailable):
            await decode.endpoint.grant(p.address, lease, [7], 5)
        decode.endpoint.discard(p.address, lease)
        p.signal(signal.SIGCONT)
        assert (await p.event("Ended"))["outcome"] == "aborted"
