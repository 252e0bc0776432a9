"""Blocks of simulated workers: how many are where, and no names.

Schedulers ask how many blocks there are and how many a sequence has, never which; only prefix
caches know blocks by name. So who simulates without these need not keep runs of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...engine.blocks import BlockAllocator
from .deployment import Deployment

NAMELESS = 0


def blocks_of(num_blocks: int, deployment: Deployment) -> BlockAllocator:
    """A simulated scheduler's pool."""
    if deployment.prefix_cache:
        return BlockAllocator(num_blocks, deployment.block_size, prefix_cache=True)
    return CountedBlocks(num_blocks, deployment.block_size)


class CountedBlocks(BlockAllocator):
    """Gives and refuses as a `BlockAllocator` without prefix cache; all blocks are alike, so one
    that is given back twice shows in the counts only. Every call costs O(1)."""

    def allocate(self, count: int) -> list[int] | None:
        free = self._free
        if count + self._num_promised > free.count:
            return None
        free.count -= count
        return [NAMELESS] * count

    def extend(self, blocks: list[int]) -> bool:
        free = self._free
        if self._num_promised >= free.count:
            return False
        free.count -= 1
        blocks.append(NAMELESS)
        return True

    def lease(self, count: int) -> list[int] | None:
        blocks = self.allocate(count)
        if blocks is not None:
            self._num_leased += count
        return blocks

    def activate(self, blocks: list[int]) -> None:
        self._num_leased -= len(blocks)

    def unlease(self, blocks: list[int]) -> None:
        self._num_leased -= len(blocks)
        self._free.count += len(blocks)

    def release(self, blocks: list[int], hashes: Sequence[int] = ()) -> None:
        self._free.count += len(blocks)

    def check(self) -> None:
        counts = self.counts()
        assert counts.free + counts.active + counts.leased == counts.total, counts
        assert min(counts.free, counts.active, counts.leased) >= 0, counts
        assert self._num_promised <= counts.active, counts

    def check_held(self, holders: Iterable[Sequence[int]]) -> None:
        held = sum([len(blocks) for blocks in holders])
        assert held == self.counts().active - self._num_promised, "somebody unknown holds blocks"
