"""A rank that does not say in time whether it began to fetch: its part may be written to, and the
worker's blocks are not free before it has spoken."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from phasewise.kv_transfer import ranked
from phasewise.kv_transfer.events import Ended, Outcome, Released, Side
from phasewise.kv_transfer.lease_parts import Event, LeaseParts, PartSilent

from .harness import BOUND_S, CALM, bounded
from .rank_process import small_spec
from .sides import Split, sides

BLOCKS = (8, 9)


@bounded
async def test_blocks_wait_for_a_rank_that_is_still_looking_for_its_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranked, "CALL_S", 0.3)
    config = {**CALM, "transport": "tcp", "answer_s": 2.0}
    split = Split(tensor=2)
    async with sides(small_spec(), split, split, config) as (prefill, decode, source, _):
        lease = prefill.kv.new_lease()
        prefill.kv.park(lease, [4, 3], 30, 7)
        silent = await asyncio.start_server(lambda *_: asyncio.sleep(BOUND_S), "127.0.0.1", 0)
        async with silent:
            port = silent.sockets[0].getsockname()[1]
            rank = replace(source.ranks[0], tcp=f"127.0.0.1:{port}")
            follower = decode.endpoints[1]
            for pair in list(follower._board.pairs.values()):
                follower._board.fault(pair, "the test breaks it")
            await decode.kv.grant(replace(source, ranks=(rank,)), lease, BLOCKS, 7)
            ended = await decode.next()
            assert isinstance(ended, Ended) and ended.outcome is Outcome.LOST
            assert follower._board._calls, "it has not given up"
            released = await decode.next()
            assert isinstance(released, Released) and released.blocks == BLOCKS
            assert not follower._board._calls


async def _silent() -> bool:
    raise PartSilent("no word in time")


async def _granted() -> bool:
    return True


def _end(outcome: Outcome) -> Ended:
    return Ended(lease=1, side=Side.RECEIVER, peer=None, outcome=outcome, reason="", blocks=BLOCKS)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("word", ["it began and ended", "it was all there", "it never began"])
@bounded
async def test_a_silent_part_holds_the_blocks_until_its_word_comes(others: int, word: str) -> None:
    told: list[Event] = []
    parts = LeaseParts(told.append, lambda _: None, lambda *_: None)
    calls = {0: _silent(), **{part: _granted() for part in range(1, others + 1)}}
    parts.open(1, Side.RECEIVER, BLOCKS, calls)
    assert await parts.begin(1, Side.RECEIVER, calls)
    for part in range(1, others + 1):
        parts.has_ended(part, 1, _end(Outcome.ABORTED))
        parts.is_released(part, 1)
    (ended,) = told
    assert isinstance(ended, Ended) and ended.outcome is not Outcome.COMMITTED
    if word == "it began and ended":
        parts.has_ended(0, 1, _end(Outcome.ABORTED))
        assert told == [ended]
        parts.is_released(0, 1)
    elif word == "it was all there":
        parts.has_ended(0, 1, _end(Outcome.COMMITTED))
    else:
        parts.was_not_fetched(0, 1)
    assert told == [ended, Released(lease=1, blocks=BLOCKS)]


@bounded
async def test_a_part_whose_word_comes_before_its_time_is_up_holds_nothing() -> None:
    """It crosses the end of the wait: read first, and looked at when all others have answered."""
    told: list[Event] = []
    parts = LeaseParts(told.append, lambda _: None, lambda *_: None)
    calls = {0: _silent(), 1: _granted()}
    parts.open(1, Side.RECEIVER, BLOCKS, calls)
    parts.was_not_fetched(0, 1)
    assert await parts.begin(1, Side.RECEIVER, calls)
    parts.has_ended(1, 1, _end(Outcome.ABORTED))
    parts.is_released(1, 1)
    assert told[1:] == [Released(lease=1, blocks=BLOCKS)]
