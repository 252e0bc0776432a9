"""Law 2, block conservation, and neighbours where possible."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from phasewise.engine.blocks import BlockAllocator, BlockCounts, runs


def taken(blocks: list[int] | None) -> list[int]:
    assert blocks is not None
    return blocks


def test_an_empty_pool_gives_one_run_of_neighbours() -> None:
    assert runs(taken(BlockAllocator(100, 16).allocate(60))) == [(0, 60)]


def test_no_room_takes_nothing() -> None:
    allocator = BlockAllocator(10, 16)
    assert allocator.allocate(11) is None
    assert allocator.lease(11) is None
    assert allocator.counts().free == 10


def test_released_neighbours_become_one_run_again() -> None:
    allocator = BlockAllocator(30, 16)
    parts = [taken(allocator.allocate(10)) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.release(part)
    assert runs(taken(allocator.allocate(30))) == [(0, 30)]


def test_a_request_prefers_a_hole_that_holds_all_of_it() -> None:
    allocator = BlockAllocator(64, 16)
    parts = [taken(allocator.allocate(8)) for _ in range(8)]
    allocator.release(parts[1])
    allocator.release(parts[3] + parts[4])
    assert len(runs(taken(allocator.allocate(9)))) == 1
    assert len(runs(taken(allocator.allocate(8)))) == 1


def test_a_request_larger_than_any_hole_takes_the_largest_first() -> None:
    allocator = BlockAllocator(40, 16)
    parts = [taken(allocator.allocate(4)) for _ in range(10)]
    allocator.release(parts[0])
    allocator.release(parts[2] + parts[3])
    allocator.release(parts[5])
    assert [length for _, length in runs(taken(allocator.allocate(12)))] == [8, 4]


def test_sequences_that_grow_in_turns_keep_to_few_runs() -> None:
    allocator = BlockAllocator(1000, 16)
    sequences = [taken(allocator.allocate(4)) for _ in range(8)]
    for _ in range(60):
        for blocks in sequences:
            assert allocator.extend(blocks)
    assert max(len(runs(blocks)) for blocks in sequences) <= 4
    allocator.check()


def test_a_shared_block_is_free_at_its_last_release() -> None:
    allocator = BlockAllocator(4, 16)
    blocks = taken(allocator.allocate(3))
    allocator.share(blocks[:2])
    allocator.release(blocks)
    assert allocator.counts() == BlockCounts(total=4, free=2, active=2, cached=0, leased=0)
    allocator.release(blocks[:2])
    assert allocator.counts().free == 4


def test_a_leased_block_is_nobodys_until_the_lease_ends() -> None:
    allocator = BlockAllocator(4, 16)
    first, second = taken(allocator.lease(2)), taken(allocator.lease(2))
    assert allocator.allocate(1) is None
    assert not allocator.extend([])
    allocator.activate(first)
    allocator.unlease(second)
    assert allocator.counts() == BlockCounts(total=4, free=2, active=2, cached=0, leased=0)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda allocator, active, leased: allocator.release(leased),
        lambda allocator, active, leased: allocator.release(active + active),
        lambda allocator, active, leased: allocator.unlease(active),
        lambda allocator, active, leased: allocator.activate(active),
        lambda allocator, active, leased: allocator.share(leased),
    ],
    ids=["release leased", "release twice", "unlease active", "activate active", "share leased"],
)
def test_misuse_fails_an_assertion(misuse: Callable[..., None]) -> None:
    allocator = BlockAllocator(8, 16)
    active, leased = taken(allocator.allocate(3)), taken(allocator.lease(3))
    with pytest.raises(AssertionError):
        misuse(allocator, active, leased)


@given(st.lists(st.integers(0, 20), unique=True))
def test_runs_are_neighbours_and_join_to_the_list(blocks: list[int]) -> None:
    split = runs(blocks)
    assert [b for first, length in split for b in range(first, first + length)] == blocks
    for (first, length), (after, _) in zip(split, split[1:], strict=False):
        assert first + length != after


class AllocatorLaws(RuleBasedStateMachine):
    """Any sequence of calls keeps the law, and nobody gets a block that someone holds."""

    @initialize(num_blocks=st.integers(0, 80))
    def start(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks, 16)
        self.active: list[list[int]] = []
        self.leased: list[list[int]] = []

    def held(self) -> set[int]:
        return {block for blocks in [*self.active, *self.leased] for block in blocks}

    @rule(count=st.integers(0, 30), lease=st.booleans())
    def take(self, count: int, lease: bool) -> None:
        before = self.held()
        blocks = self.allocator.lease(count) if lease else self.allocator.allocate(count)
        if blocks is None:
            assert count > self.allocator.num_blocks - len(before)
            return
        assert len(set(blocks)) == count and not before & set(blocks)
        (self.leased if lease else self.active).append(blocks)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.active))
        before, last = self.held(), blocks[-1] if blocks else None
        if not self.allocator.extend(blocks):
            assert len(before) == self.allocator.num_blocks
            return
        assert blocks[-1] not in before
        if last is not None and last + 1 < self.allocator.num_blocks and last + 1 not in before:
            assert blocks[-1] == last + 1, "the neighbour was free"

    @precondition(lambda self: self.active)
    @rule(data=st.data(), keep=st.booleans())
    def release_or_share(self, data: st.DataObject, keep: bool) -> None:
        blocks = data.draw(st.sampled_from(self.active))
        if keep:
            self.allocator.share(blocks)
            self.active.append(list(blocks))
        else:
            self.active.remove(blocks)
            self.allocator.release(blocks)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), here=st.booleans())
    def end_lease(self, data: st.DataObject, here: bool) -> None:
        blocks = data.draw(st.sampled_from(self.leased))
        self.leased.remove(blocks)
        if here:
            self.allocator.activate(blocks)
            self.active.append(blocks)
        else:
            self.allocator.unlease(blocks)

    @invariant()
    def law(self) -> None:
        self.allocator.check()
        counts = self.allocator.counts()
        assert counts.leased == sum(map(len, self.leased))
        assert counts.free == counts.total - len(self.held())
        for block in self.held():
            holders = sum(block in blocks for blocks in self.active)
            assert self.allocator.references(block) == holders


TestAllocatorLaws = AllocatorLaws.TestCase
TestAllocatorLaws.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
