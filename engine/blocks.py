"""Who holds which block of a KV pool. Ids only: knows neither tensors nor tokens.

A block is free, active (one or more references), leased (a remote writer may write to it) or
cached (no reference, its contents known by name for a later prompt with the same prefix).
Law: `free + active + cached + leased == total` after every call, and a leased block is given to
nobody before `activate` or `unlease`. Who takes blocks gets free ones first, then cached ones,
the least recently used leaves of the prefix forest. What can only be a caller's bug fails an
assertion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .free_runs import FreeRuns
from .prefix import PrefixIndex

_LEASED = -1  # in place of a number of references


class BlockCounts(NamedTuple):
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
    A block that is or becomes known by name costs O(log blocks) to release and to take.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        """Without `prefix_cache` no block is ever known by name, and `release` frees."""
        assert num_blocks >= 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size  # positions a block
        self._references = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._num_leased = 0
        self._num_promised = 0  # of the free runs, but active
        self.prefixes = PrefixIndex(num_blocks) if prefix_cache else None

    @property
    def num_free(self) -> int:
        return self._free.count - self._num_promised

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free and cached ones."""
        free = self._free.count - self._num_promised
        return free if self.prefixes is None else free + self.prefixes.num_idle

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` active blocks with one reference each; None, and nothing taken, without room."""
        return self._take(count, 1)

    def extend(self, blocks: list[int]) -> bool:
        """Append one active block, if possible the neighbour of the last; False without room."""
        if not self._make_free(1):
            return False
        block = self._free.take_after(blocks[-1] if blocks else -1)
        self._references[block] = 1
        blocks.append(block)
        return True

    def promise(self, count: int) -> bool:
        """`count` blocks become active without names: someone is as good as `extend`ed by them.
        False, and nothing taken, without room."""
        if not self._make_free(count):
            return False
        self._num_promised += count
        return True

    def redeem(self, blocks: list[int], count: int) -> None:
        """Append that many of the promised blocks."""
        self.unpromise(count)
        for _ in range(count):
            extended = self.extend(blocks)
            assert extended, "a promised block is there"

    def unpromise(self, count: int) -> None:
        """That many promised blocks become free."""
        assert count <= self._num_promised, (count, self._num_promised)
        self._num_promised -= count

    def share(self, blocks: list[int]) -> None:
        """One more reference to each of these active or cached blocks."""
        references = self._references
        for block in blocks:
            if not references[block] and self.prefixes is not None:
                self.prefixes.wake(block)
            else:
                assert references[block] > 0, f"block {block} is shared but not active"
            references[block] += 1

    def release(self, blocks: list[int], hashes: Sequence[int] = ()) -> None:
        """One reference less to each; at the last one a block is cached if known, else free.

        `hashes` name the first `len(hashes)` blocks, which are complete: what of them is not
        known yet becomes known, and what is known as another block is freed.
        """
        if self.prefixes is not None:
            self.prefixes.tick()
            self._remember(self.prefixes, blocks, hashes)
        for first, length in runs(blocks):
            end = first + length
            if self.prefixes is None and self._references[first:end] == [1] * length:
                self._references[first:end] = [0] * length
                self._free.put(first, length)
                continue
            self._release_run(first, end)

    def lookup(self, hashes: Sequence[int]) -> list[int]:
        """Blocks of the longest known prefix; `share` them to keep them."""
        return [] if self.prefixes is None else self.prefixes.lookup(hashes)

    def publish(self, blocks: list[int], hashes: Sequence[int], first: int) -> None:
        """The active blocks `[first, len(hashes))` are complete: others may find them.

        Stops at a prefix that is known as another block, so that who uses a block uses its
        parent.
        """
        prefixes = self.prefixes
        if prefixes is None:
            return
        parent = blocks[first - 1] if first else -1
        if first and prefixes.get(hashes[first - 1]) != parent:
            return
        for block, name in zip(blocks[first:], hashes[first:], strict=False):
            known = prefixes.get(name)
            if known is None:
                assert self._references[block] > 0, f"block {block} is published but not active"
                prefixes.enter(block, name, parent)
            elif known != block:
                return
            parent = block

    def adopt(self, blocks: list[int], hashes: Sequence[int]) -> list[int]:
        """As `publish` from the first block on, but what is known as another block is exchanged
        for that one; returns the blocks that the caller holds now. Nobody reads or writes them
        meanwhile."""
        prefixes = self.prefixes
        if prefixes is None:
            return blocks
        held = list(blocks)
        spare = []
        for i, name in enumerate(hashes):
            known = prefixes.get(name)
            if known is None:
                prefixes.enter(held[i], name, held[i - 1] if i else -1)
            elif known != held[i]:
                self.share([known])
                spare.append(held[i])
                held[i] = known
        self.release(spare)
        return held

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
        free, leased = self.num_free, self._num_leased
        cached = self.num_available - free
        return BlockCounts(
            total=self.num_blocks,
            free=free,
            active=self.num_blocks - free - cached - leased,
            cached=cached,
            leased=leased,
        )

    def references(self, block: int) -> int:
        """References to a block; 0 for free, cached and leased ones."""
        return max(0, self._references[block])

    def check(self) -> None:
        """Assert the law from the blocks themselves, O(num_blocks)."""
        counts = self.counts()
        total = counts.free + counts.active + counts.cached + counts.leased
        assert total == counts.total, counts
        assert min(counts.free, counts.active, counts.leased) >= 0, counts
        assert self._references.count(_LEASED) == counts.leased, counts
        unnamed = counts.free + self._num_promised
        assert self._references.count(0) == unnamed + counts.cached, counts
        assert min(self._references, default=0) >= _LEASED
        previous_end = -1
        for first, length in self._free.runs():
            assert first > previous_end, "free runs touch or overlap"
            previous_end = first + length
            assert self._references[first:previous_end] == [0] * length, (first, length)
        assert sum(length for _, length in self._free.runs()) == unnamed, counts
        if self.prefixes is not None:
            self.prefixes.check(self._references)

    def check_held(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the references are those of the holders' blocks, O(num_blocks)."""
        held = Counter(block for blocks in holders for block in blocks)
        named = self.counts().active - self._num_promised
        assert len(held) == named, "somebody unknown holds blocks"
        assert all(self._references[block] == count for block, count in held.items())

    def _take(self, count: int, references: int) -> list[int] | None:
        if not self._make_free(count):
            return None
        blocks: list[int] = []
        for first, length in self._free.take(count):
            self._references[first : first + length] = [references] * length
            blocks.extend(range(first, first + length))
        return blocks

    def _make_free(self, count: int) -> bool:
        """Give up cached blocks until `count` are free; False, and none given up, without room."""
        needed = count + self._num_promised
        if needed <= self._free.count:
            return True
        if self.prefixes is None or count > self.num_available:
            return False
        while self._free.count < needed:
            self._free.put(self.prefixes.evict(), 1)
        return True

    def _release_run(self, first: int, end: int) -> None:
        references, prefixes = self._references, self.prefixes
        for block in range(first, end):
            assert references[block] > 0, f"block {block} is released but not active"
            references[block] -= 1
            if references[block]:
                continue
            if prefixes is not None and prefixes.name(block) is not None:
                prefixes.idle(block)
            else:
                self._free.put(block, 1)

    def _remember(self, prefixes: PrefixIndex, blocks: list[int], hashes: Sequence[int]) -> None:
        parent = -1
        for block, name in zip(blocks, hashes, strict=False):
            known = prefixes.get(name)
            if known is None:
                prefixes.enter(block, name, parent)
                known = block
            elif prefixes.is_idle(known):
                prefixes.touch(known)
            parent = known

    def _end_lease(self, blocks: list[int], references: int) -> list[tuple[int, int]]:
        ended = runs(blocks)
        for first, length in ended:
            end = first + length
            leased = self._references[first:end] == [_LEASED] * length
            assert leased, f"blocks [{first}, {end}) are not all leased"
            self._references[first:end] = [references] * length
        self._num_leased -= len(blocks)
        return ended
