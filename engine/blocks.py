"""Who holds which block of a KV pool. Ids only: knows neither tensors nor tokens.

A block is free, active (one or more references) or leased (a remote writer may write to it).
Law: `free + active + cached + leased == total` after every call, and a leased block is given to
nobody before `activate` or `unlease`. What can only be a caller's bug fails an assertion.
"""

from __future__ import annotations

from dataclasses import dataclass

from .free_runs import FreeRuns

_LEASED = -1  # in place of a number of references


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCounts:
    """How many blocks are in each state."""

    total: int
    free: int
    active: int
    cached: int  # no reference, contents kept for a later prompt with the same prefix
    leased: int


def runs(blocks: list[int]) -> list[tuple[int, int]]:
    """Split a list of blocks, in its order, into (first, length) runs of neighbours."""
    if not blocks:
        return []
    first, length = blocks[0], len(blocks)
    if blocks == list(range(first, first + length)):
        return [(first, length)]
    found = []
    start = previous = first
    for block in blocks[1:]:
        if block != previous + 1:
            found.append((start, previous + 1 - start))
            start = block
        previous = block
    found.append((start, previous + 1 - start))
    return found


class BlockAllocator:
    """Hands out blocks `[0, num_blocks)`, neighbours where possible.

    `allocate`, `lease`, `release` cost O(runs) plus a slice assignment a run; `extend` is O(1).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size  # positions a block
        self._references = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._num_leased = 0

    @property
    def num_free(self) -> int:
        return self._free.count

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` active blocks with one reference each; None, and nothing taken, without room."""
        return self._take(count, 1)

    def extend(self, blocks: list[int]) -> bool:
        """Append one active block, if possible the neighbour of the last; False without room."""
        if not self._free.count:
            return False
        block = self._free.take_after(blocks[-1] if blocks else -1)
        self._references[block] = 1
        blocks.append(block)
        return True

    def share(self, blocks: list[int]) -> None:
        """One more reference to each of these active blocks."""
        references = self._references
        for block in blocks:
            assert references[block] > 0, f"block {block} is shared but not active"
            references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One reference less to each; a block is free at the last one."""
        references = self._references
        for first, length in runs(blocks):
            end = first + length
            if references[first:end] == [1] * length:
                references[first:end] = [0] * length
                self._free.put(first, length)
                continue
            for block in range(first, end):
                assert references[block] > 0, f"block {block} is released but not active"
                references[block] -= 1
                if not references[block]:
                    self._free.put(block, 1)

    def lease(self, count: int) -> list[int] | None:
        """`count` blocks for a remote writer; None, and nothing taken, without room."""
        blocks = self._take(count, _LEASED)
        if blocks is not None:
            self._num_leased += count
        return blocks

    def activate(self, blocks: list[int]) -> None:
        """Leased blocks whose KV is here become active with one reference each."""
        self._end_lease(blocks, 1)

    def unlease(self, blocks: list[int]) -> None:
        """Leased blocks that nobody can write to any more become free."""
        for first, length in self._end_lease(blocks, 0):
            self._free.put(first, length)

    def counts(self) -> BlockCounts:
        free, leased = self._free.count, self._num_leased
        return BlockCounts(
            total=self.num_blocks,
            free=free,
            active=self.num_blocks - free - leased,
            cached=0,
            leased=leased,
        )

    def references(self, block: int) -> int:
        """References to a block; 0 for free and leased ones."""
        return max(0, self._references[block])

    def check(self) -> None:
        """Assert the law from the blocks themselves, O(num_blocks)."""
        counts = self.counts()
        total = counts.free + counts.active + counts.cached + counts.leased
        assert total == counts.total, counts
        assert min(counts.free, counts.active, counts.leased) >= 0, counts
        assert self._references.count(_LEASED) == counts.leased, counts
        assert self._references.count(0) == counts.free, counts
        assert min(self._references, default=0) >= _LEASED
        previous_end = -1
        for first, length in self._free.runs():
            assert first > previous_end, "free runs touch or overlap"
            previous_end = first + length
            assert self._references[first:previous_end] == [0] * length, (first, length)
        assert sum(length for _, length in self._free.runs()) == counts.free, counts

    def _take(self, count: int, references: int) -> list[int] | None:
        if count > self._free.count:
            return None
        blocks: list[int] = []
        for first, length in self._free.take(count):
            self._references[first : first + length] = [references] * length
            blocks.extend(range(first, first + length))
        return blocks

    def _end_lease(self, blocks: list[int], references: int) -> list[tuple[int, int]]:
        ended = runs(blocks)
        for first, length in ended:
            end = first + length
            leased = self._references[first:end] == [_LEASED] * length
            assert leased, f"blocks [{first}, {end}) are not all leased"
            self._references[first:end] = [references] * length
        self._num_leased -= len(blocks)
        return ended
