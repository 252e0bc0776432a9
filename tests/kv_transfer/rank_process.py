"""One rank of a worker's transfer half as a process of its own, driven by JSON lines.

A leader prints where its followers come to, then, when all have, its address; it takes commands
and prints events as `peer_process` does. A follower is told the leader's door and ends with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.kv_transfer.events import Asked
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.rank_follower import FollowerEndpoint, RankFollower
from phasewise.kv_transfer.rank_wire import unpack_address
from phasewise.kv_transfer.ranked import RankDoor, RankedEndpoint
from phasewise.tests.kv_transfer.peer_process import tell
from phasewise.tests.kv_transfer.sides import Side, Split

MODEL = Path(__file__).parents[2] / "models" / "tiny"
NUM_TOKENS = 64
OVER, AHEAD = -1, 1 << 20  # a step whose layers followers have, and one that never comes


def small_spec() -> ModelSpec:
    heads = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
    return dataclasses.replace(load_spec(MODEL), **heads)


def kv_of(seed: int) -> np.ndarray:  # [layers, 2, heads, tokens, row bytes]
    """Of the prompt that every lease is about."""
    spec = small_spec()
    shape = (spec.num_layers, 2, spec.num_kv_heads, NUM_TOKENS, 4 * spec.head_dim)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Leader:
    def __init__(self, side: Side, num_ranks: int) -> None:
        self.door = RankDoor("127.0.0.1")
        self.kv = RankedEndpoint(side.endpoints[0], self.door, num_ranks)
        self.num_layers = len(side.held[0].own.layers)
        self.grants: list[list[int]] = []

    async def serve(self) -> None:
        tell(door=[self.door.address, self.door.secret])
        address = await self.kv.start()
        tell(address=asdict(address))
        watch = asyncio.create_task(self.watch())
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            method = getattr(self, "do_" + command.pop("do"))
            tell(done=await method(**command))
        watch.cancel()
        await self.kv.close()

    async def watch(self) -> None:
        async for event in self.kv.events():
            if isinstance(event, Asked) and self.grants:
                self.kv.answer(event, self.grants.pop(0))
            tell(event=type(event).__name__, **asdict(event))

    async def do_grants(self, blocks: list[list[int]]) -> None:
        """How to answer the asks to come."""
        self.grants += blocks

    async def do_ask(self, peer: dict[str, Any], num_blocks: int) -> tuple[int, bool]:
        lease = self.kv.new_lease()
        return lease, await self.kv.ask(unpack_address(peer), lease, num_blocks)

    async def do_push(self, lease: int, blocks: list[int], layers: int) -> None:
        """All of it; or the leader's first layers, and nothing on the followers."""
        clock = LayerClock(OVER if layers == self.num_layers else AHEAD)
        self.kv.push(lease, blocks, 0, clock)
        for layer in range(layers):
            clock.finish(layer)

    async def do_commit(self, lease: int, num_tokens: int, digest: int) -> None:
        self.kv.commit(lease, num_tokens, digest)

    async def do_park(self, blocks: list[int], num_tokens: int, digest: int) -> int:
        lease = self.kv.new_lease()
        self.kv.park(lease, blocks, num_tokens, digest)
        return lease


async def follow(side: Side, rank: int, door: list[str]) -> None:
    endpoint = side.endpoints[rank]
    assert isinstance(endpoint, FollowerEndpoint)
    address, secret = door
    await RankFollower(endpoint, side.steps[rank]).run(address, secret, rank)


async def serve(setup: dict[str, Any]) -> None:
    split = Split(tensor=setup["tensor"], block_size=setup["block_size"])
    side = Side(setup["name"], small_spec(), split, setup["config"], setup["incarnation"])
    side.write(kv_of(setup["seed"]), setup["blocks"])
    if setup["rank"] == 0:
        await Leader(side, split.tensor).serve()
    else:
        await follow(side, setup["rank"], setup["door"])


def main(setup: dict[str, Any]) -> None:
    """`{"rank": 0, "name": ..., "incarnation": ..., "tensor": 2, ...}`"""
    asyncio.run(serve(setup))
