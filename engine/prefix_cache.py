"""Sequences and the blocks they share: what a scheduler asks and tells its prefix cache.

Promises: of a sequence's tokens at least one is always left to compute, so that logits exist; a
block is found only once its KV is complete; nobody writes to a block that was found. Without a
cache (`BlockAllocator(prefix_cache=False)`) everything here holds with nothing ever found.
"""

from __future__ import annotations

from .blocks import BlockAllocator
from .prefix import extend_hashes
from .sequence import Sequence


class PrefixCache:
    """One a scheduler, over its allocator. Hashes cost O(new blocks) a call."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self.allocator = allocator
        self.is_on = allocator.prefixes is not None
        self.hit_tokens = 0  # that admitted sequences did not compute, since the start
        self.asked_tokens = 0  # of admitted sequences
        self._underway: dict[int, str] = {}  # names of blocks being computed, and for whom

    def hashes(self, sequence: Sequence) -> list[int]:
        """Names of all full blocks of the known tokens."""
        if not self.is_on:
            return []
        if sequence.tokens is None:
            return sequence.block_hashes
        return extend_hashes(
            sequence.block_hashes,
            sequence.tokens,
            self.allocator.block_size,
            sequence.request.cache_salt,
        )

    def shareable(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Names of the full blocks before the last of the first `num_tokens` tokens."""
        return self.hashes(sequence)[: (num_tokens - 1) // self.allocator.block_size]

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence; not kept until `admit`."""
        if not self.is_on:
            return []
        return self.allocator.lookup(self.shareable(sequence, sequence.num_tokens))

    def num_to_take(self, found: list[int], num_blocks: int) -> int:
        """Available blocks that someone with `num_blocks` in all takes: new ones, and found ones
        that only the cache holds."""
        prefixes = self.allocator.prefixes
        if prefixes is None:
            return num_blocks
        return num_blocks - len(found) + sum([prefixes.is_idle(block) for block in found])

    def who_computes(self, sequence: Sequence) -> str | None:
        """Id of the sequence for which the block after the longest known prefix is being
        computed here: to wait for that is cheaper than to compute it twice."""
        if not self._underway:
            return None
        hashes = self.shareable(sequence, sequence.num_tokens)
        num_known = len(self.allocator.lookup(hashes))
        return self._underway.get(hashes[num_known]) if num_known < len(hashes) else None

    def admit(self, sequence: Sequence, found: list[int]) -> bool:
        """Give a sequence blocks for all its tokens, beginning with those `find` found, and mark
        these tokens as computed; False, and nothing taken, without room."""
        allocator = self.allocator
        num_blocks = allocator.blocks_for(sequence.num_tokens)
        if self.num_to_take(found, num_blocks) > allocator.num_available:
            return False
        allocator.share(found)
        rest = allocator.allocate(num_blocks - len(found))
        assert rest is not None, "num_to_take() says so"
        sequence.blocks = found + rest
        sequence.num_computed = len(found) * allocator.block_size
        self.hit_tokens += sequence.num_computed
        self.asked_tokens += sequence.num_tokens
        if sequence.first_scheduled_s is None:
            sequence.cached_tokens = sequence.num_computed
        for name in self.hashes(sequence)[len(found) :]:
            self._underway.setdefault(name, sequence.id)
        return True

    def computed(self, sequence: Sequence, start: int) -> None:
        """The positions `[start, num_computed)` are complete: their full blocks can be found."""
        if not self.is_on:
            return
        size = self.allocator.block_size
        first, end = start // size, sequence.num_computed // size
        if first == end:
            return
        hashes = self.hashes(sequence)[:end]
        if len(hashes) > first:
            self.allocator.publish(sequence.blocks, hashes, first)
            self._settle(sequence, hashes[first:])

    def arrived(self, sequence: Sequence) -> None:
        """KV of all computed positions has come from elsewhere: it can be found, and stands in
        one place with what was here before. No step computes the sequence."""
        if self.is_on:
            hashes = self.hashes(sequence)[: sequence.num_computed // self.allocator.block_size]
            sequence.blocks = self.allocator.adopt(sequence.blocks, hashes)

    def drop(self, sequence: Sequence, num_complete: int | None = None) -> None:
        """Take a sequence's blocks. Full ones among the first `num_complete` positions (None: all
        that are computed) can be found until their place is needed."""
        if not self.is_on:
            self.allocator.release(sequence.blocks)
            sequence.blocks = []
            return
        hashes = self.hashes(sequence)
        if num_complete is None:
            num_complete = sequence.num_computed
        if hashes:
            self._settle(sequence, hashes)
            hashes = hashes[: num_complete // self.allocator.block_size]
        self.allocator.release(sequence.blocks, hashes)
        sequence.blocks = []

    def _settle(self, sequence: Sequence, hashes: list[int]) -> None:
        """These blocks are not under way for the sequence any more."""
        underway = self._underway
        if not underway:
            return
        for name in hashes:
            if underway.get(name) == sequence.id:
                del underway[name]

    def check(self, live: set[str]) -> None:
        """Assert that what is under way is so for a sequence that is `live`."""
        assert set(self._underway.values()) <= live, "someone is waited for who is gone"
