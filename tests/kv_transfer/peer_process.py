"""A worker's transfer half as a process of its own, driven by JSON lines.

Prints its address first; then answers each command line with one `{"done": ...}` line and prints
each event as `{"event": ...}`. The pool starts filled with bytes that `name` and place decide.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Asked, TransferConfig
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.memory import PoolMemory


def fill(memory: PoolMemory, layout: KVLayout, seed: int) -> np.ndarray:
    """Bytes as `[layers, blocks, block_bytes]`, alike wherever the seed is."""
    pool = np.frombuffer(memory.buffer, np.uint8)
    pool = pool.reshape(layout.num_layers, layout.num_blocks, layout.block_bytes)
    pool[:] = np.random.default_rng(seed).integers(0, 256, pool.shape, dtype=np.uint8)
    return pool


def address_of(fields: dict[str, Any]) -> TransferAddress:
    return TransferAddress(**{**fields, "worker": WorkerId(**fields["worker"])})


class PeerProcess:
    def __init__(self, setup: dict[str, Any]) -> None:
        layout = KVLayout(**setup["layout"])
        self.memory = PoolMemory(layout.num_bytes)
        self.pool = fill(self.memory, layout, setup["seed"])
        worker = WorkerId(name=setup["name"], incarnation=setup["incarnation"])
        config = TransferConfig(**setup["config"])
        self.endpoint = KVEndpoint(worker, layout, self.memory, config)
        self.grants: list[list[int]] = []
        self.clocks: dict[int, LayerClock] = {}

    async def serve(self) -> None:
        address = await self.endpoint.start()
        tell(address=asdict(address), pid=os.getpid())
        watch = asyncio.create_task(self.watch())
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            method = getattr(self, "do_" + command.pop("do"))
            tell(done=await method(**command))
        await self.endpoint.close()
        await watch

    async def watch(self) -> None:
        async for event in self.endpoint.events():
            if isinstance(event, Asked) and self.grants:
                self.endpoint.answer(event, self.grants.pop(0) or None)
            tell(event=type(event).__name__, **asdict(event))

    async def do_grants(self, blocks: list[list[int]]) -> None:
        """How to answer the asks to come; an empty list says no."""
        self.grants += blocks

    async def do_ask(self, peer: dict[str, Any], num_blocks: int) -> tuple[int, bool]:
        lease = self.endpoint.new_lease()
        return lease, await self.endpoint.ask(address_of(peer), lease, num_blocks)

    async def do_push(self, lease: int, blocks: list[int], first: int, layers: int) -> None:
        clock = self.clocks[lease] = LayerClock()
        self.endpoint.push(lease, blocks, first, clock)
        await self.do_layers(lease, layers)

    async def do_layers(self, lease: int, layers: int) -> None:
        """The compute thread comes as far as `layers`."""
        for layer in range(self.clocks[lease].done, layers):
            await asyncio.to_thread(self.clocks[lease].finish, layer)

    async def do_fail(self, lease: int) -> None:
        self.clocks[lease].fail()

    async def do_commit(self, lease: int, num_tokens: int, digest: int) -> None:
        self.endpoint.commit(lease, num_tokens, digest)

    async def do_park(self, blocks: list[int], num_tokens: int, digest: int) -> int:
        lease = self.endpoint.new_lease()
        self.endpoint.park(lease, blocks, num_tokens, digest)
        return lease

    async def do_fetch(
        self, peer: dict[str, Any], lease: int, blocks: list[int], digest: int
    ) -> None:
        await self.endpoint.grant(address_of(peer), lease, blocks, digest)

    async def do_abort(self, lease: int) -> None:
        self.endpoint.abort(lease)

    async def do_digest(self, blocks: list[int]) -> str:
        """Of what stands in these blocks, in every layer."""
        return hashlib.sha256(self.pool[:, blocks].tobytes()).hexdigest()

    async def do_fds(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def tell(**fields: Any) -> None:
    print(json.dumps(fields, default=bytes.hex), flush=True)


def main(setup: dict[str, Any]) -> None:
    """`{"name": ..., "incarnation": ..., "seed": ..., "config": {...}, "layout": {...}}`"""
    asyncio.run(PeerProcess(setup).serve())
