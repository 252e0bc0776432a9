"""KV moves between two processes: pushed by layers and chunks, pulled, side by side."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from dataclasses import asdict

import numpy as np
import pytest
from phasewise.kv_transfer.events import Outcome, PeerRefused, PeerUnavailable
from phasewise.kv_transfer.layer_clock import finished_clock

from .harness import CALM, LAYERED, LAYOUT, bounded, here, pool_bytes, there

every = pytest.mark.parametrize("transport", ["shm", "tcp", "gloo"])
sizes = pytest.mark.parametrize("config", [CALM, LAYERED], ids=["whole", "layered"])


@every
@sizes
@bounded
async def test_pushed_blocks_are_equal_on_both_sides(transport: str, config: dict) -> None:
    config = {**config, "transport": transport}
    async with here("decode", 1, config) as (decode, address), there("prefill", 2, config) as p:
        asking = asyncio.create_task(p.do("ask", peer=asdict(address), num_blocks=5))
        assert decode.endpoint.answer(await decode.asked(), [9, 10, 11, 3, 40])
        lease, granted = await asking
        assert granted
        # two chunks: the second fills the boundary block 7 and goes on
        await p.do("push", lease=lease, blocks=[5, 6, 7], first=0, layers=4)
        await p.do("push", lease=lease, blocks=[7, 8, 50], first=2, layers=2)
        await p.do("layers", lease=lease, layers=4)
        await p.do("commit", lease=lease, num_tokens=70, digest=99)
        ended = await decode.ended()
        assert (ended.outcome, ended.lease, ended.digest) == (Outcome.COMMITTED, lease, 99)
        assert (ended.blocks, ended.num_tokens) == ((9, 10, 11, 3, 40), 70)
        sent, before = pool_bytes(2), pool_bytes(1)
        expected = before.copy()
        expected[:, [9, 10, 11, 3, 40]] = sent[:, [5, 6, 7, 8, 50]]
        assert np.array_equal(decode.pool, expected)  # these blocks, and no other byte
        there_too = await p.event("Ended")
        assert there_too["outcome"] == "committed"
        assert there_too["blocks"] == [5, 6, 7, 8, 50]
        assert decode.endpoint.pairs()[0].transport == transport


@every
@sizes
@bounded
async def test_parked_blocks_are_fetched_when_decode_has_room(transport: str, config: dict) -> None:
    config = {**config, "transport": transport}
    async with here("decode", 1, config) as (decode, _), there("prefill", 2, config) as p:
        lease = await p.do("park", blocks=[1, 2, 3], num_tokens=48, digest=5)
        await decode.endpoint.grant(p.address, lease, [60, 61, 7], 5)
        assert (await decode.ended()).outcome is Outcome.COMMITTED
        assert np.array_equal(decode.pool[:, [60, 61, 7]], pool_bytes(2)[:, [1, 2, 3]])
        assert (await p.event("Ended"))["outcome"] == "committed"


@every
@bounded
async def test_many_leases_at_once_each_get_their_own_blocks(transport: str) -> None:
    config = {**LAYERED, "transport": transport}
    async with here("decode", 1, config) as (decode, address), there("prefill", 2, config) as p:
        leases = [
            await p.do("park", blocks=[i, i + 20], num_tokens=32, digest=i) for i in range(20)
        ]
        assert await decode.endpoint.connect(p.address) == transport
        grants = [
            decode.endpoint.grant(p.address, lease, [63 - i, 43 - i], i)
            for i, lease in enumerate(leases)
        ]
        await asyncio.gather(*grants)
        ended = [await decode.ended() for _ in leases]
        assert {e.lease for e in ended} == set(leases)
        assert all(e.outcome is Outcome.COMMITTED for e in ended)
        sent = pool_bytes(2)
        for i in range(20):
            assert np.array_equal(decode.pool[:, [63 - i, 43 - i]], sent[:, [i, i + 20]])
        assert len(decode.endpoint.pairs()) == 1
        assert address.worker.name == "decode"


@every
@bounded
async def test_no_room_is_an_answer_and_the_lease_may_be_parked(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with (
        here("decode", 1, config) as (decode, address),
        here("prefill", 2, config) as (prefill, back),
    ):
        lease = prefill.endpoint.new_lease()
        asking = asyncio.create_task(prefill.endpoint.ask(address, lease, 2))
        decode.endpoint.answer(await decode.asked(), None)
        assert await asking is False
        prefill.endpoint.park(lease, [4, 5], 20, 1)
        await decode.endpoint.grant(back, lease, [6, 7], 1)
        assert (await decode.ended()).outcome is Outcome.COMMITTED


@bounded
async def test_an_ask_that_nobody_answers_is_withdrawn_in_time() -> None:
    config = {**CALM, "answer_s": 0.3}
    async with here("decode", 1, config) as (decode, address), here("p", 2, config) as (p, _):
        assert await p.endpoint.ask(address, p.endpoint.new_lease(), 2) is False
        asked = await decode.asked()
        assert decode.endpoint.answer(asked, [1, 2]) is False  # the blocks stay with decode


@every
@bounded
async def test_fetching_what_is_not_parked_ends_as_aborted(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with here("decode", 1, config) as (decode, _), here("p", 2, config) as (_, back):
        await decode.endpoint.grant(back, 12345, [1, 2], 0)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == (1, 2)


@every
@bounded
async def test_discarded_kv_is_free_at_once_and_fetched_by_nobody(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with here("decode", 1, config) as (decode, _), there("prefill", 2, config) as p:
        lease = await p.do("park", blocks=[1, 2, 3], num_tokens=48, digest=5)
        decode.endpoint.discard(p.address, lease)
        ended = await p.event("Ended")
        assert (ended["lease"], ended["outcome"]) == (lease, "aborted")
        assert ended["blocks"] == [1, 2, 3]
        decode.endpoint.discard(p.address, lease)  # again: of no effect
        await decode.endpoint.grant(p.address, lease, [6, 7, 8], 5)
        assert (await decode.ended()).outcome is Outcome.ABORTED


@bounded
async def test_a_discard_for_a_peer_that_is_gone_ends_by_itself() -> None:
    async with here("decode", 1, {**CALM, "park_s": 0.3}) as (decode, _):
        async with here("p", 2, CALM) as (_, gone):
            pass
        decode.endpoint.discard(gone, 5)
        while not decode.endpoint.counters().get("discard not delivered"):
            await asyncio.sleep(0.01)


@every
@bounded
async def test_kv_of_other_tokens_than_were_fetched_is_not_committed(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with here("decode", 1, config) as (decode, _), here("p", 2, config) as (p, back):
        lease = p.endpoint.new_lease()
        p.endpoint.park(lease, [1], 10, 111)
        await decode.endpoint.grant(back, lease, [5], 222)
        ended = await decode.ended()
        assert (ended.outcome, "other tokens" in ended.reason) == (Outcome.ABORTED, True)
        assert (await decode.released()).blocks == (5,)
        assert (await p.ended()).outcome is Outcome.ABORTED


@every
@bounded
async def test_a_block_changed_on_the_way_is_found_before_the_commit(transport: str) -> None:
    config = {**LAYERED, "transport": transport}
    async with here("decode", 1, config) as (decode, address), here("p", 2, config) as (p, _):
        lease = p.endpoint.new_lease()
        asking = asyncio.create_task(p.endpoint.ask(address, lease, 2))
        decode.endpoint.answer(await decode.asked(), [8, 9])
        assert await asking
        p.endpoint.push(lease, [1, 2], 0, finished_clock(LAYOUT.num_layers))
        while not np.array_equal(decode.pool[:, [8, 9]], p.pool[:, [1, 2]]):
            await asyncio.sleep(0.005)  # bounded by the test's own limit
        decode.pool[2, 9, 17] ^= 1
        p.endpoint.commit(lease, 20, 0)
        ended = await decode.ended()
        assert (ended.outcome, "contents differ" in ended.reason) == (Outcome.ABORTED, True)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@bounded
async def test_auto_takes_shared_memory_on_one_host_and_tcp_otherwise(transport: str) -> None:
    offered = {**CALM, "transport": "auto" if transport == "shm" else "tcp"}
    async with here("decode", 1, offered) as (_, address), here("p", 2, CALM) as (p, _):
        assert await p.endpoint.connect(address) == transport
        (pair,) = p.endpoint.pairs()
        assert (pair.transport, pair.ready, pair.peer) == (transport, True, address.worker)


@bounded
async def test_two_workers_of_different_transports_refuse_each_other_by_name() -> None:
    by_group, by_tcp = {**CALM, "transport": "gloo"}, {**CALM, "transport": "tcp"}
    async with here("decode", 1, by_group) as (_, address), here("p", 2, by_tcp) as (p, _):
        with pytest.raises(PeerRefused, match="takes KV by gloo, not by tcp"):
            await p.endpoint.connect(address)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 5),
        ("fingerprint", "other"),
        ("dtype", "float16"),
        ("dtype", "fp8_e4m3"),
    ],
)
@bounded
async def test_another_layout_is_refused_by_name(transport: str, field: str, value: object) -> None:
    config = {**CALM, "transport": transport}
    async with (
        here("decode", 1, config) as (decode, address),
        there("prefill", 2, config, **{field: value}) as p,
    ):
        with pytest.raises(PeerRefused, match=f"{field} is"):
            await decode.endpoint.connect(p.address)
        assert decode.endpoint.pairs() == ()
        assert address.worker.name == "decode"


@every
@bounded
async def test_a_stale_incarnation_is_refused(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with here("decode", 1, config) as (decode, address):
        async with here("p", 2, config, incarnation=7) as (newer, _):
            await newer.endpoint.connect(address)
        async with here("p", 2, config, incarnation=6) as (older, back):
            with pytest.raises((PeerRefused, PeerUnavailable), match="replaced by p#7"):
                await older.endpoint.connect(address)
            with pytest.raises(PeerRefused, match="replaced by p#7"):
                await decode.endpoint.connect(back)


@every
@bounded
async def test_an_address_of_an_earlier_incarnation_reaches_nobody(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with (
        here("decode", 1, config, incarnation=2) as (_, address),
        here("p", 2, config) as (
            p,
            _,
        ),
    ):
        from dataclasses import replace

        stale = replace(address, worker=replace(address.worker, incarnation=1))
        with pytest.raises(PeerRefused, match="this is decode#2, not decode#1"):
            await p.endpoint.connect(stale)


@every
@bounded
async def test_nothing_is_left_after_close(transport: str) -> None:
    config = {**LAYERED, "transport": transport}

    async def once() -> None:
        async with here("decode", 1, config) as (decode, _), here("p", 2, config) as (p, back):
            lease = p.endpoint.new_lease()
            p.endpoint.park(lease, [1], 10, 1)
            await decode.endpoint.grant(back, lease, [5], 1)
            assert (await decode.ended()).outcome is Outcome.COMMITTED

    await once()
    before, now = (0, 0), _held()
    while now != before:  # a group closes its sockets in its own time
        await asyncio.sleep(0.3)
        before, now = now, _held()
    for _ in range(3):
        await once()
    while any(more > most for more, most in zip(_held(), before, strict=True)):
        await asyncio.sleep(0.05)  # bounded by the test's own limit


def _held() -> tuple[int, int]:
    """Descriptors and threads."""
    gc.collect()  # the test's own pools
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@every
@bounded
async def test_a_push_after_the_end_is_ignored(transport: str) -> None:
    config = {**CALM, "transport": transport}
    async with here("decode", 1, config) as (decode, address), here("p", 2, config) as (p, _):
        lease = p.endpoint.new_lease()
        asking = asyncio.create_task(p.endpoint.ask(address, lease, 1))
        decode.endpoint.answer(await decode.asked(), [3])
        assert await asking
        decode.endpoint.abort(lease)
        assert (await p.ended()).outcome is Outcome.ABORTED
        p.endpoint.push(lease, [9], 0, finished_clock(LAYOUT.num_layers))
        p.endpoint.commit(lease, 3, 0)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == (3,)
        assert np.array_equal(decode.pool, pool_bytes(1))
