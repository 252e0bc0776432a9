"""A peer that dies, hangs, gives up, lies or babbles: one terminal event, blocks back when safe."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict

import numpy as np
import pytest
from phasewise.engine.request import TransferAddress
from phasewise.kv_transfer.events import Outcome, PeerUnavailable
from phasewise.kv_transfer.layer_clock import LayerClock, finished_clock
from phasewise.kv_transfer.messages import Beat, Grant, Message, framed, pack_blocks

from .harness import (
    BOUND_S,
    LAYERED,
    LAYOUT,
    QUICK,
    Here,
    There,
    at_once,
    bounded,
    here,
    pool_bytes,
    there,
)

TRANSPORTS = ["shm", "tcp", "gloo"]
STAGED = ["tcp", "gloo"]  # the receiver writes its pool
POINTS = [0, 1, 2, 3, 4]  # layers
DEADLY = [signal.SIGKILL, signal.SIGSTOP]
every = pytest.mark.parametrize("transport", TRANSPORTS)
points = pytest.mark.parametrize("layers", POINTS)
TARGET = [20, 21, 22]


@asynccontextmanager
async def pushing(
    transport: str, layers: int, **config: object
) -> AsyncIterator[tuple[Here, There, int, TransferAddress]]:
    """A prefill process with a grant of TARGET, `layers` of its blocks' four computed."""
    chosen = {**LAYERED, "transport": transport, **config}
    async with here("decode", 1, chosen) as (decode, address), there("prefill", 2, chosen) as p:
        asking = asyncio.create_task(p.do("ask", peer=asdict(address), num_blocks=3))
        assert decode.endpoint.answer(await decode.asked(), TARGET)
        lease, granted = await asking
        assert granted
        await p.do("push", lease=lease, blocks=[1, 2, 3], first=0, layers=layers)
        yield decode, p, lease, address


async def still_serves(worker: Here, transport: str) -> None:
    """The survivor takes KV from somebody else."""
    config = {**LAYERED, "transport": transport}
    async with here("other", 5, config) as (other, address):
        lease = other.endpoint.new_lease()
        other.endpoint.park(lease, [30], 9, 1)
        await worker.endpoint.grant(address, lease, [50], 1)
        assert (await worker.ended()).outcome is Outcome.COMMITTED
        assert np.array_equal(worker.pool[:, 50], pool_bytes(5)[:, 30])


@every
@points
@bounded
async def test_killed_sender_ends_the_lease_and_frees_its_blocks(
    transport: str, layers: int
) -> None:
    async with pushing(transport, layers) as (decode, p, lease, _):
        p.signal(signal.SIGKILL)
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.LOST)
        assert (await decode.released()).blocks == tuple(TARGET)
        assert await decode.is_quiet(0.1)
        await still_serves(decode, transport)


@bounded
async def test_a_lease_given_up_as_its_sender_is_found_dead_ends_before_it_is_released() -> None:
    """The abort's own word finds the pair broken and the process gone, which frees the blocks."""
    async with pushing("shm", 2) as (decode, p, lease, _):
        (pair,) = decode.endpoint._board.pairs.values()
        p.signal(signal.SIGKILL)
        p.process.join(BOUND_S)  # nobody here has noticed
        pair.sock.shutdown(socket.SHUT_WR)
        decode.endpoint.abort(lease)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == tuple(TARGET)
        assert await decode.is_quiet(0.1)


@at_once(layers=POINTS)
async def test_hung_sender_over_shared_memory_keeps_its_blocks_until_it_answers(
    layers: int,
) -> None:
    async with pushing("shm", layers, **QUICK) as (decode, p, lease, _):
        p.signal(signal.SIGSTOP)
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.LOST)
        assert await decode.is_quiet(0.3)  # ended, but not released: it may write when it wakes
        (pair,) = decode.endpoint.pairs()
        assert (pair.ready, pair.quarantined_blocks) == (False, 3)
        await still_serves(decode, "shm")
        p.signal(signal.SIGCONT)
        assert (await decode.released()).blocks == tuple(TARGET)
        assert (await p.event("Ended"))["outcome"] == "lost"
        assert all(pair.quarantined_blocks == 0 for pair in decode.endpoint.pairs())


@bounded
async def test_hung_sender_over_shared_memory_that_is_killed_frees_its_blocks() -> None:
    async with pushing("shm", 2, **QUICK) as (decode, p, lease, _):
        p.signal(signal.SIGSTOP)
        assert (await decode.ended()).outcome is Outcome.LOST
        p.signal(signal.SIGKILL)
        released = await decode.released()
        assert (released.lease, released.blocks) == (lease, tuple(TARGET))


@at_once(transport=STAGED, layers=POINTS)
async def test_hung_sender_loses_its_blocks_at_once_where_the_receiver_writes(
    transport: str, layers: int
) -> None:
    async with pushing(transport, layers, **QUICK) as (decode, p, lease, _):
        p.signal(signal.SIGSTOP)
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.LOST)
        assert (await decode.released()).blocks == tuple(TARGET)
        decode.pool[:, TARGET] = 7  # in use by another request from now on
        p.signal(signal.SIGCONT)
        assert (await p.event("Ended"))["outcome"] == "lost"
        assert (decode.pool[:, TARGET] == 7).all()
        await still_serves(decode, transport)


@at_once(transport=TRANSPORTS, number=DEADLY)
async def test_sender_lost_before_its_grant_leaves_the_blocks_with_the_receiver(
    transport: str, number: signal.Signals
) -> None:
    config = {**LAYERED, **QUICK, "transport": transport}
    async with here("decode", 1, config) as (decode, address), there("prefill", 2, config) as p:
        asking = asyncio.create_task(p.do("ask", peer=asdict(address), num_blocks=3))
        asked = await decode.asked()
        p.signal(number)
        await _until(lambda: not any(pair.ready for pair in decode.endpoint.pairs()))
        assert decode.endpoint.answer(asked, TARGET) is False
        assert await decode.is_quiet(0.1)
        asking.cancel()
        await still_serves(decode, transport)


@at_once(transport=TRANSPORTS, number=DEADLY)
async def test_receiver_lost_before_its_grant_is_no_grant(
    transport: str, number: signal.Signals
) -> None:
    config = {**LAYERED, **QUICK, "transport": transport}
    async with here("prefill", 2, config) as (p, _), there("decode", 1, config) as decode:
        lease = p.endpoint.new_lease()
        asking = asyncio.create_task(p.endpoint.ask(decode.address, lease, 3))
        await decode.event("Asked")  # and nobody answers
        decode.signal(number)
        assert await asking is False
        p.endpoint.park(lease, [1, 2, 3], 40, 0)  # somebody else may fetch it
        p.endpoint.abort(lease)
        assert (await p.ended()).blocks == (1, 2, 3)
        assert await p.is_quiet(0.1)


@at_once(transport=TRANSPORTS, number=DEADLY)
async def test_peers_lost_after_the_commit_change_nothing(
    transport: str, number: signal.Signals
) -> None:
    async with pushing(transport, 4, **QUICK) as (decode, p, lease, _):
        await p.do("commit", lease=lease, num_tokens=40, digest=0)
        assert (await decode.ended()).outcome is Outcome.COMMITTED
        assert (await p.event("Ended"))["outcome"] == "committed"
        p.signal(number)
        await _until(lambda: not any(pair.ready for pair in decode.endpoint.pairs()))
        assert await decode.is_quiet(0.1)
        assert np.array_equal(decode.pool[:, TARGET], pool_bytes(2)[:, [1, 2, 3]])
        await still_serves(decode, transport)


@at_once(transport=TRANSPORTS, number=DEADLY, layers=[0, 2])
async def test_dead_or_hung_receiver_gives_the_sender_its_blocks_back(
    transport: str, number: signal.Signals, layers: int
) -> None:
    config = {**LAYERED, **QUICK, "transport": transport}
    async with here("prefill", 2, config) as (p, _), there("decode", 1, config) as decode:
        await decode.do("grants", blocks=[TARGET])
        lease = p.endpoint.new_lease()
        assert await p.endpoint.ask(decode.address, lease, 3)
        clock = LayerClock()
        p.endpoint.push(lease, [1, 2, 3], 0, clock)
        for layer in range(layers):
            clock.finish(layer)
        decode.signal(number)
        ended = await p.ended()
        assert (ended.lease, ended.outcome, ended.blocks) == (lease, Outcome.LOST, (1, 2, 3))
        assert await p.is_quiet(0.1)
        with pytest.raises(PeerUnavailable):
            await p.endpoint.ask(decode.address, p.endpoint.new_lease(), 1)


@at_once(transport=TRANSPORTS)
async def test_full_socket_to_a_hung_receiver_does_not_hold_the_sender(transport: str) -> None:
    """More bytes than all buffers take: the copier is stuck in a write when the peer is lost."""
    config = {**LAYERED, **QUICK, "transport": transport}
    big = {"head_dim": 1024}  # 256 KiB a block
    async with there("prefill", 2, config, **big) as p, there("decode", 1, config, **big) as d:
        await d.do("grants", blocks=[list(range(60))])
        lease, granted = await p.do("ask", peer=asdict(d.address), num_blocks=60)
        assert granted
        d.signal(signal.SIGSTOP)
        await p.do("push", lease=lease, blocks=list(range(60)), first=0, layers=4)
        await p.do("commit", lease=lease, num_tokens=900, digest=0)
        assert (await p.event("Ended"))["outcome"] == "lost"


@every
@bounded
async def test_abort_by_the_receiver_in_mid_push_ends_both_sides(transport: str) -> None:
    async with pushing(transport, 2) as (decode, p, lease, _):
        decode.endpoint.abort(lease)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == tuple(TARGET)
        assert (await p.event("Ended"))["outcome"] == "aborted"
        decode.pool[:, TARGET] = 7
        await p.do("layers", lease=lease, layers=4)
        await p.do("commit", lease=lease, num_tokens=40, digest=0)
        await still_serves(decode, transport)
        assert (decode.pool[:, TARGET] == 7).all()


@every
@bounded
async def test_abort_by_the_sender_in_mid_push_ends_both_sides(transport: str) -> None:
    async with pushing(transport, 2) as (decode, p, lease, _):
        await p.do("abort", lease=lease)
        assert (await decode.ended()).outcome is Outcome.ABORTED
        assert (await decode.released()).blocks == tuple(TARGET)
        assert (await p.event("Ended"))["blocks"] == [1, 2, 3]


@every
@bounded
async def test_a_step_that_fails_ends_its_lease(transport: str) -> None:
    async with pushing(transport, 1) as (decode, p, lease, _):
        await p.do("fail", lease=lease)
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.ABORTED)
        assert (await decode.released()).blocks == tuple(TARGET)
        assert (await p.event("Ended"))["reason"] == "the step failed"


@at_once(transport=TRANSPORTS)
async def test_a_writer_that_makes_no_progress_expires(transport: str) -> None:
    async with pushing(transport, 2, **QUICK, lease_s=0.6) as (decode, p, lease, _):
        ended = await decode.ended()
        assert (ended.lease, ended.outcome) == (lease, Outcome.EXPIRED)
        assert (await decode.released()).blocks == tuple(TARGET)
        assert (await p.event("Ended"))["outcome"] == "expired"


@bounded
async def test_parked_kv_that_nobody_fetches_expires() -> None:
    async with here("p", 2, {**QUICK, "park_s": 0.3}) as (p, _):
        lease = p.endpoint.new_lease()
        p.endpoint.park(lease, [4, 5], 20, 0)
        ended = await p.ended()
        assert (ended.outcome, ended.blocks) == (Outcome.EXPIRED, (4, 5))


@every
@bounded
async def test_a_restarted_sender_is_a_new_peer(transport: str) -> None:
    config = {**LAYERED, "transport": transport}
    async with pushing(transport, 2) as (decode, p, lease, address):
        p.signal(signal.SIGKILL)
        assert (await decode.ended()).outcome is Outcome.LOST
        await decode.released()
        async with there("prefill", 4, config, incarnation=2) as again:
            asking = asyncio.create_task(again.do("ask", peer=asdict(address), num_blocks=1))
            assert decode.endpoint.answer(await decode.asked(), [20])
            new, granted = await asking
            assert granted and new != lease
            await again.do("push", lease=new, blocks=[8], first=0, layers=4)
            await again.do("commit", lease=new, num_tokens=3, digest=0)
            assert (await decode.ended()).outcome is Outcome.COMMITTED
            assert np.array_equal(decode.pool[:, 20], pool_bytes(4)[:, 8])


@pytest.mark.parametrize("count", [1, 4, 5, 70_000])
@every
@bounded
async def test_babble_on_the_port_harms_nobody(transport: str, count: int) -> None:
    config = {**LAYERED, "transport": transport}
    babble = [b"PWKC" + b"\xff" * count, b"PWKD" + b"x" * count, bytes(range(256)) * count]
    async with here("decode", 1, config) as (decode, address):
        for data in babble:
            await asyncio.to_thread(_babble, address, data)
        await still_serves(decode, transport)


@every
@bounded
async def test_babble_from_a_peer_ends_that_pair_only(transport: str) -> None:
    config = {**LAYERED, "transport": transport}
    async with (
        here("decode", 1, config) as (decode, address),
        here("liar", 2, config) as (liar, _),
    ):
        lease = liar.endpoint.new_lease()
        asking = asyncio.create_task(liar.endpoint.ask(address, lease, 1))
        decode.endpoint.answer(await decode.asked(), [3])
        assert await asking
        (pair,) = liar.endpoint._board.pairs.values()
        pair.sock.send(framed(b"\x93\x01\x02\x03\x04"))
        assert (await decode.ended()).outcome is Outcome.LOST
        assert (await decode.released()).blocks == (3,)
        assert decode.endpoint.counters()["malformed"] == 1
        await still_serves(decode, transport)


@pytest.mark.parametrize(
    "message", [Grant(1, 9, 0, pack_blocks((64,))), Grant(1, 9, 0, b"cut"), Beat(b"cut", b"", 0)]
)
@every
@bounded
async def test_blocks_that_are_not_there_end_the_pair_and_nothing_is_written(
    transport: str, message: Message
) -> None:
    config = {**LAYERED, "transport": transport}
    async with here("p", 2, config) as (p, address), here("liar", 1, config) as (liar, _):
        p.endpoint.park(1, [5], 3, 0)
        await liar.endpoint.connect(address)
        (pair,) = liar.endpoint._board.pairs.values()
        pair.write(message)
        await _until(lambda: p.endpoint.counters().get("malformed", 0) == 1)
        assert p.endpoint._senders.get(1) is not None  # still parked, for somebody else
        assert np.array_equal(liar.pool, pool_bytes(1))


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # bounded by the test's own limit
        await asyncio.sleep(0.01)


@bounded
async def test_a_write_out_of_range_or_without_a_lease_changes_no_byte() -> None:
    config = {**LAYERED, "transport": "tcp"}
    async with (
        here("decode", 1, config) as (decode, address),
        here("liar", 2, config) as (liar, _),
    ):
        await liar.endpoint.connect(address)
        (pair,) = liar.endpoint._board.pairs.values()
        from phasewise.kv_transfer.copier import Push

        for lease, first in ((77, 0), (78, 60)):
            pair.copier.submit(
                Push(
                    lease=lease,
                    generation=1,
                    first=first,
                    source=(1, 2),
                    target=(3, 4),
                    clock=finished_clock(LAYOUT.num_layers),
                )
            )
        await still_serves(decode, "tcp")
        refused = 2 * LAYOUT.num_layers
        await _until(lambda: decode.endpoint.counters().get("late write", 0) >= refused)
        expected = pool_bytes(1)
        expected[:, 50] = decode.pool[:, 50]
        assert np.array_equal(decode.pool, expected)
        assert decode.endpoint.counters()["late write"] == refused


def _babble(address: TransferAddress, data: bytes) -> None:
    if address.shm:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("\0" + address.shm)
    else:
        host, port = address.tcp.rsplit(":", 1)
        sock = socket.create_connection((host, int(port)))
    with sock:
        sock.settimeout(BOUND_S)
        with contextlib.suppress(OSError):  # hung up on: as it should
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
