"""A worker's side of a transfer over any number of ranks, all on one loop, and what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.engine.shard_plan import plan_shards
from phasewise.engine.spec import ModelSpec
from phasewise.kv_transfer.events import Asked, Ended, Released, TransferConfig
from phasewise.kv_transfer.fit import Held, held_by
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.rank_endpoint import RankEndpoint
from phasewise.kv_transfer.rank_follower import FollowerEndpoint, RankFollower, StepClocks
from phasewise.kv_transfer.ranked import RankDoor, RankedEndpoint

NUM_BLOCKS = 40
BOUND_S = 20.0
_incarnations = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a worker holds the model."""

    tensor: int = 1
    pipeline: int = 1
    block_size: int = 16
    dtype: str = "float32"


class Side:
    """A leader, its followers and their pools."""

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        split: Split,
        config: dict[str, Any],
        incarnation: int | None = None,
    ) -> None:
        """`incarnation`: none twice, where it is not given."""
        shards = plan_shards(spec, tensor_parallel=split.tensor, pipeline_parallel=split.pipeline)
        incarnation = incarnation or next(_incarnations)
        self.split = split
        self.pools: list[np.ndarray] = []  # of the ranks, as bytes
        self.memories: list[PoolMemory] = []
        self.held: list[Held] = []
        self.endpoints: list[RankEndpoint] = []
        for shard in shards:
            layout = KVLayout(
                num_layers=len(shard.layers),
                num_blocks=NUM_BLOCKS,
                num_kv_heads=len(shard.kv_heads),
                block_size=split.block_size,
                head_dim=spec.head_dim,
                dtype=split.dtype,
                fingerprint="tiny",
            )
            memory = PoolMemory(layout.num_bytes)
            pool = np.frombuffer(memory.buffer, np.uint8)
            pool[:] = np.random.default_rng(shard.rank).integers(0, 256, len(pool), np.uint8)
            held = held_by(shards, shard.rank, layout)
            kind = FollowerEndpoint if shard.rank else RankEndpoint
            suffix = f".{shard.rank}" if shard.rank else ""
            worker = WorkerId(name=name + suffix, incarnation=incarnation)
            self.endpoints.append(kind(worker, layout, memory, TransferConfig(**config), held))
            self.memories.append(memory)
            self.pools.append(pool)
            self.held.append(held)
        self.steps = [StepClocks(len(one.own.layers)) for one in self.held]
        self.kv: RankEndpoint | RankedEndpoint = self.endpoints[0]
        self._tasks: list[asyncio.Task[None]] = []
        self._stream: AsyncIterator[Asked | Ended | Released]

    async def start(self) -> TransferAddress:
        leader, *followers = self.endpoints
        if followers:
            door = RankDoor("127.0.0.1")
            self.kv = RankedEndpoint(leader, door, len(self.endpoints))
            for rank, endpoint in enumerate(followers, 1):
                assert isinstance(endpoint, FollowerEndpoint)
                follower = RankFollower(endpoint, self.steps[rank])
                work = follower.run(door.address, door.secret, rank)
                self._tasks.append(asyncio.create_task(work))
        address = await self.kv.start()
        self._stream = self.kv.events()
        return address

    async def close(self) -> None:
        await self.kv.close()
        await asyncio.wait_for(asyncio.gather(*self._tasks, return_exceptions=True), BOUND_S)
        for memory in self.memories:
            memory.close()

    async def next(self) -> Asked | Ended | Released:
        return await asyncio.wait_for(anext(self._stream), BOUND_S)

    def begin(self, step: int) -> tuple[LayerClock, list[Any]]:
        """A step starts on every rank: the leader's clock, and what each rank's layers go to."""
        clock = LayerClock(step)
        return clock, [clock.finish, *(steps.begin(step) for steps in self.steps[1:])]

    async def compute(self, finishes: list[Any]) -> None:
        """Every rank's layers come in, one after another, unless they are there already."""
        for rank, finish in enumerate(finishes):
            for layer in range(len(self.held[rank].own.layers)):
                finish(layer)
                await asyncio.sleep(0)

    def write(self, kv: np.ndarray, blocks: Sequence[int]) -> None:
        """`kv` [layers, 2, heads, tokens, row bytes] into these blocks, on every rank."""
        for held, sections in zip(self.held, self._views(), strict=True):
            layers, heads = _place(held)
            own, first = kv[layers, :, heads], 0
            for view in sections:
                last = first + view.shape[-1]
                for token in range(kv.shape[3]):
                    block, at = divmod(token, self.split.block_size)
                    view[:, blocks[block], :, :, at] = own[:, :, :, token, first:last]
                first = last

    def read(self, blocks: Sequence[int], num_tokens: int) -> np.ndarray:
        """As `write` takes it: put together over the ranks, which agree where several hold it."""
        parts = [held.own for held in self.held]
        num_layers = max(part.layers.stop for part in parts)
        num_heads = max(part.kv_heads.stop for part in parts)
        row = sum(size for _, size in parts[0].layout.sections)
        whole = np.zeros((num_layers, 2, num_heads, num_tokens, row), np.uint8)
        known = np.zeros((num_layers, num_heads), bool)
        for held, sections in zip(self.held, self._views(), strict=True):
            rows = np.concatenate(sections, axis=-1)
            own = np.concatenate([rows[:, block] for block in blocks], axis=3)[..., :num_tokens, :]
            layers, heads = _place(held)
            if known[layers, heads].any():
                assert (whole[layers, :, heads] == own).all(), "ranks with one head agree"
            whole[layers, :, heads], known[layers, heads] = own, True
        assert known.all()
        return whole

    def _views(self) -> list[list[np.ndarray]]:
        """A rank's sections, [layers, blocks, 2, heads, tokens, bytes] each."""
        views = []
        for held, pool in zip(self.held, self.pools, strict=True):
            layout = held.own.layout
            shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads)
            tiles = pool.reshape(*shape, layout.tile_bytes)
            size = layout.block_size
            views.append(
                [
                    tiles[..., start : start + size * row].reshape(*shape, size, row)
                    for start, row in layout.sections
                ]
            )
        return views

    def others(self, blocks: Sequence[int]) -> list[bytes]:
        """What the blocks hold that are not these."""
        rest = [block for block in range(NUM_BLOCKS) if block not in blocks]
        return [
            pool.reshape(held.own.layout.num_layers, NUM_BLOCKS, -1)[:, rest].tobytes()
            for held, pool in zip(self.held, self.pools, strict=True)
        ]


def _place(held: Held) -> tuple[slice, slice]:
    """Of a rank's layers and heads in the whole model."""
    part = held.own
    layers = slice(part.layers.start, part.layers.stop)
    return layers, slice(part.kv_heads.start, part.kv_heads.stop)


@contextlib.asynccontextmanager
async def sides(
    spec: ModelSpec, source: Split, target: Split, config: dict[str, Any]
) -> AsyncIterator[tuple[Side, Side, TransferAddress, TransferAddress]]:
    """A prefill and a decode worker that have met, and where each is."""
    prefill, decode = Side("p", spec, source, config), Side("d", spec, target, config)
    try:
        addresses = [await asyncio.wait_for(side.start(), BOUND_S) for side in (prefill, decode)]
        await asyncio.wait_for(prefill.kv.connect(addresses[1]), BOUND_S)
        yield prefill, decode, addresses[0], addresses[1]
    finally:
        await asyncio.gather(prefill.close(), decode.close())
