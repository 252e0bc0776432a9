"""A worker that dies and comes back where it was is another worker."""

from __future__ import annotations

import signal
from dataclasses import replace

import numpy as np
import pytest
from phasewise.kv_transfer.events import Outcome, PeerRefused, PeerUnavailable
from phasewise.kv_transfer.layer_clock import LayerClock, finished_clock

from .harness import BOUND_S, LAYERED, LAYOUT, bounded, here, pool_bytes, there
from .wire import wire

CONFIG = {**LAYERED, "transport": "tcp"}
TARGET = [20, 21]


@bounded
async def test_a_restart_on_the_same_port_is_a_new_peer_and_inherits_nothing() -> None:
    async with (
        here("decode", 1, CONFIG) as (decode, _),
        there("p", 2, CONFIG) as first,
        wire(first.address, None) as (relay, address),
    ):
        old = await first.do("park", blocks=[1, 2], num_tokens=20, digest=5)
        await decode.endpoint.connect(address)
        first.signal(signal.SIGKILL)
        first.process.join(BOUND_S)
        async with there("p", 3, CONFIG, incarnation=2) as second:
            relay.lead_to(second.address)
            with pytest.raises((PeerRefused, PeerUnavailable)):
                await decode.endpoint.grant(address, old, TARGET, 5)
            again = replace(address, worker=second.address.worker)
            new = await second.do("park", blocks=[1, 2], num_tokens=20, digest=5)
            await decode.endpoint.grant(again, old, TARGET, 5)  # what the dead one held
            assert (await decode.ended()).outcome is Outcome.ABORTED
            assert (await decode.released()).blocks == tuple(TARGET)
            assert np.array_equal(decode.pool, pool_bytes(1)), "nothing was written"
            await decode.endpoint.grant(again, new, TARGET, 5)
            assert (await decode.ended()).outcome is Outcome.COMMITTED
            assert np.array_equal(decode.pool[:, TARGET], pool_bytes(3)[:, [1, 2]])


@bounded
async def test_a_lease_of_the_dead_is_not_gone_on_with_by_who_stands_there_now() -> None:
    """Restarted faster than its silence is noticed."""
    async with (
        here("p", 2, CONFIG) as (p, _),
        there("decode", 1, CONFIG) as first,
        wire(first.address, None) as (relay, address),
    ):
        await first.do("grants", blocks=[TARGET])
        lease = p.endpoint.new_lease()
        assert await p.endpoint.ask(address, lease, 2)
        first.signal(signal.SIGKILL)
        async with there("decode", 3, CONFIG, incarnation=2) as second:
            relay.lead_to(second.address)
            again = replace(address, worker=second.address.worker)
            await second.do("grants", blocks=[TARGET])
            new = p.endpoint.new_lease()
            assert await p.endpoint.ask(again, new, 2)
            p.endpoint.push(lease, [1, 2], 0, _computed())
            p.endpoint.commit(lease, 20, 5)
            ended = await p.ended()
            assert (ended.lease, ended.outcome) == (lease, Outcome.LOST)
            p.endpoint.push(new, [1, 2], 0, _computed())
            p.endpoint.commit(new, 20, 5)
            ended = await p.ended()
            assert (ended.lease, ended.outcome) == (new, Outcome.COMMITTED)
            assert await p.is_quiet(0.1)


def _computed() -> LayerClock:
    return finished_clock(LAYOUT.num_layers)
