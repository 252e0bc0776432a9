"""What a peer says of itself is checked before anything is done with it."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from phasewise.engine.request import WorkerId
from phasewise.kv_transfer.handshake import Hello, hear, say
from phasewise.kv_transfer.messages import MalformedFrame

from .harness import LAYOUT, bounded

HELLO = Hello(
    worker=WorkerId(name="prefill", incarnation=1),
    wants=WorkerId(name="decode", incarnation=2),
    layout=LAYOUT,
    rank=0,
    holds=((0, LAYOUT.num_layers, 0, LAYOUT.num_kv_heads),),
    pool_bytes=LAYOUT.num_bytes,
    canary_slot=3,
    checksum=True,
    transport="tcp",
)


@bounded
async def test_a_hello_arrives_as_it_was_said() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        await say(ours, HELLO, None)
        assert (await hear(theirs)).hello == HELLO


@pytest.mark.parametrize("slot", [-1, 0, 1 << 32])
@bounded
async def test_a_canary_slot_that_no_frame_can_name_is_refused(slot: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        await say(ours, replace(HELLO, canary_slot=slot), None)
        with pytest.raises(MalformedFrame):
            await hear(theirs)
