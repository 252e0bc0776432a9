"""Counted blocks give and refuse as named ones do, so a simulation is the same with either."""

from __future__ import annotations

import random

import pytest
from phasewise.engine.blocks import BlockAllocator
from phasewise.placement.simulation.blocks import CountedBlocks, blocks_of

from .simulated_clusters import pair

TOTAL = 40
Held = list[tuple[list[int], list[int]]]


class Both:
    """A pool with names and one without, asked the same."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.named, self.counted = BlockAllocator(TOTAL, 4), CountedBlocks(TOTAL, 4)
        self.active: Held = []
        self.leased: Held = []
        self.promised = 0

    def take(self, verb: str, held: Held) -> None:
        count = self.draw.randint(1, 12)
        named, counted = (getattr(pool, verb)(count) for pool in (self.named, self.counted))
        assert (named is None) == (counted is None)
        if named is not None:
            assert len(named) == len(counted) == count
            held.append((named, counted))

    def give(self, verb: str, held: Held) -> Held:
        """Whom the call was about, if there is anybody."""
        if not held:
            return []
        pair_of = held.pop(self.draw.randrange(len(held)))
        for pool, blocks in zip((self.named, self.counted), pair_of, strict=True):
            getattr(pool, verb)(blocks)
        return [pair_of]

    def grow(self) -> None:
        if self.active:
            named, counted = self.draw.choice(self.active)
            assert self.named.extend(named) == self.counted.extend(counted)
            assert len(named) == len(counted)

    def promise(self) -> None:
        count = self.draw.randint(0, 6)
        given = self.named.promise(count)
        assert given == self.counted.promise(count)
        self.promised += count * given

    def redeem(self) -> None:
        if self.active and self.promised:
            named, counted = self.draw.choice(self.active)
            self.named.redeem(named, 1)
            self.counted.redeem(counted, 1)
            self.promised -= 1

    def check(self) -> None:
        assert self.named.counts() == self.counted.counts()
        for i, pool in enumerate((self.named, self.counted)):
            pool.check()
            pool.check_held(blocks[i] for blocks in self.active)


@pytest.mark.parametrize("seed", range(10))
def test_counted_blocks_give_and_refuse_as_named_ones(seed: int) -> None:
    draw = random.Random(seed)
    both = Both(draw)
    for _ in range(200):
        match draw.randrange(8):
            case 0:
                both.take("allocate", both.active)
            case 1:
                both.take("lease", both.leased)
            case 2:
                both.give("release", both.active)
            case 3:
                both.active += both.give("activate", both.leased)
            case 4:
                both.give("unlease", both.leased)
            case 5:
                both.grow()
            case 6:
                both.promise()
            case _:
                both.redeem()
        both.check()


def test_a_block_that_nobody_gives_back_is_noticed() -> None:
    blocks = CountedBlocks(8, 4)
    blocks.allocate(3)
    with pytest.raises(AssertionError, match="somebody unknown"):
        blocks.check_held([])


def test_blocks_have_names_where_a_prefix_cache_looks_for_them() -> None:
    assert blocks_of(8, pair(prefix_cache=True)).prefixes is not None
    assert isinstance(blocks_of(8, pair()), CountedBlocks)
