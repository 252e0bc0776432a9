"""Names of prefixes, and which block holds which. Pure; knows neither tensors nor requests.

A full block's name is a hash of its tokens and of the block before it, so that it stands for
everything from the first token on. A tenant's `cache_salt` goes into the first block's
predecessor: two tenants have no name in common. 128 bits of BLAKE2b, so that nobody finds two
prefixes with one name.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice

HASH_BYTES = 16
SHORT_MASK = (1 << 64) - 1  # routing hints carry half of a name
MAX_JOURNAL = 16384  # changes that a reader may lag behind before it starts anew
MAX_SNAPSHOT = 131072  # names that a new reader is told, 1 MiB

_ROOT = -1  # stands for the block before the first


def extend_hashes(
    hashes: list[int], token_ids: Sequence[int], block_size: int, cache_salt: str = ""
) -> list[int]:
    """Append the names of the full blocks of `token_ids` that `hashes` lacks; O(new blocks)."""
    first, end = len(hashes), len(token_ids) // block_size
    if first >= end:
        return hashes
    if hashes:
        before = hashes[-1].to_bytes(HASH_BYTES, "little")
    else:
        before = hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES).digest()
    packed = array("I", token_ids[first * block_size : end * block_size]).tobytes()
    width = len(packed) // (end - first)
    for start in range(0, len(packed), width):
        data = before + packed[start : start + width]
        before = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
        hashes.append(int.from_bytes(before, "little"))
    return hashes


def pack_hashes(hashes: Iterable[int]) -> bytes:
    return b"".join([name.to_bytes(HASH_BYTES, "little") for name in hashes])


def unpack_hashes(packed: bytes) -> list[int]:
    """What is cut off at the end is no name."""
    ends = range(HASH_BYTES, len(packed) + 1, HASH_BYTES)
    return [int.from_bytes(packed[end - HASH_BYTES : end], "little") for end in ends]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixNews:
    """Names, cut to 64 bits, that a reader has to add and to remove; with `reset`, after
    forgetting all it knew. `cursor` is what to ask with next."""

    cursor: int
    reset: bool
    added: list[int]
    removed: list[int]


class PrefixIndex:
    """A forest of blocks by name: a block's parent holds what stands before it.

    The owner of the references tells when a block is idle (nobody refers to it) and when it is
    in use again. Who uses a block uses its parent, so below an idle block all are idle: given up
    leaf by leaf, the least recently used first, every idle block can be had.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_idle = 0
        self._block_of: dict[int, int] = {}
        self._hash_of: list[int | None] = [None] * num_blocks
        self._parent = [_ROOT] * num_blocks
        self._children = [0] * num_blocks
        self._idle = bytearray(num_blocks)
        self._used = [0] * num_blocks  # when it was last in use, in `_clock`'s ticks
        self._clock = 0
        self._leaves: list[tuple[int, int]] = []  # heap of (used, block); some are out of date
        self._journal: deque[tuple[int, bool]] = deque(maxlen=MAX_JOURNAL)
        self._num_changes = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def lookup(self, hashes: Sequence[int]) -> list[int]:
        """Blocks of the longest known prefix."""
        blocks = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def get(self, name: int) -> int | None:
        return self._block_of.get(name)

    def name(self, block: int) -> int | None:
        """What the block is known as; None: its contents are nobody else's concern."""
        return self._hash_of[block]

    def enter(self, block: int, name: int, parent: int) -> None:
        """A block in use, complete, becomes known; `parent` < 0 for a first block."""
        assert self._hash_of[block] is None and name not in self._block_of, (block, name)
        assert parent < 0 or self._hash_of[parent] is not None, "the parent is known"
        self._block_of[name] = block
        self._hash_of[block] = name
        self._parent[block] = max(parent, _ROOT)
        if parent >= 0:
            self._children[parent] += 1
        self._note(name, True)

    def tick(self) -> None:
        """What is told to be idle from now on was used later than what was before."""
        self._clock += 1

    def idle(self, block: int) -> None:
        """Nobody refers to a known block any more."""
        self._idle[block] = 1
        self.num_idle += 1
        self.touch(block)

    def is_idle(self, block: int) -> bool:
        return bool(self._idle[block])

    def touch(self, block: int) -> None:
        """An idle block was of use just now."""
        self._used[block] = self._clock
        if not self._children[block]:
            self._push(block)

    def wake(self, block: int) -> None:
        """Somebody refers to an idle block again."""
        assert self._idle[block], f"block {block} is shared but neither active nor cached"
        self._idle[block] = 0
        self.num_idle -= 1

    def evict(self) -> int:
        """Give up the idle leaf that was used longest ago; returns its block. There is one."""
        while True:
            used, block = heappop(self._leaves)
            if self._is_leaf(block) and self._used[block] == used:
                break
        name, parent = self._hash_of[block], self._parent[block]
        assert name is not None
        del self._block_of[name]
        self._hash_of[block] = None
        self._idle[block] = 0
        self.num_idle -= 1
        self._note(name, False)
        if parent >= 0:
            self._children[parent] -= 1
            if self._is_leaf(parent):
                self._push(parent)
        return block

    def news(self, cursor: int) -> PrefixNews:
        """Changes since `cursor` (-1: a new reader), or everything for who is too far behind."""
        behind = self._num_changes - cursor
        if cursor < 0 or behind > len(self._journal):
            names = [name & SHORT_MASK for name in islice(self._block_of, MAX_SNAPSHOT)]
            return PrefixNews(cursor=self._num_changes, reset=True, added=names, removed=[])
        last: dict[int, bool] = {}
        for name, known in islice(self._journal, len(self._journal) - behind, None):
            last[name & SHORT_MASK] = known
        return PrefixNews(
            cursor=self._num_changes,
            reset=False,
            added=[name for name, known in last.items() if known],
            removed=[name for name, known in last.items() if not known],
        )

    def check(self, references: Sequence[int]) -> None:
        """Assert the laws of this index, O(num_blocks)."""
        children = [0] * len(self._hash_of)
        for name, block in self._block_of.items():
            assert self._hash_of[block] == name
            assert bool(self._idle[block]) == (references[block] == 0), block
            parent = self._parent[block]
            if parent >= 0:
                children[parent] += 1
                assert self._hash_of[parent] is not None, "a parent went before its child"
                assert references[block] <= references[parent], "a parent is used less than a child"
        assert children == self._children
        assert sum(self._idle) == self.num_idle
        assert sum(name is not None for name in self._hash_of) == len(self._block_of)
        waiting = set(self._leaves)
        for block, idle in enumerate(self._idle):
            assert not idle or self._hash_of[block] is not None
            assert not self._is_leaf(block) or (self._used[block], block) in waiting

    def _is_leaf(self, block: int) -> bool:
        return bool(self._idle[block]) and not self._children[block]

    def _push(self, block: int) -> None:
        if len(self._leaves) > 2 * len(self._idle) + 64:
            leaves = [other for other in range(len(self._idle)) if self._is_leaf(other)]
            self._leaves = [(self._used[other], other) for other in leaves]
            heapify(self._leaves)
        heappush(self._leaves, (self._used[block], block))

    def _note(self, name: int, known: bool) -> None:
        self._num_changes += 1
        self._journal.append((name, known))
