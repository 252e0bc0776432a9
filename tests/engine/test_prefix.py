"""Shared prefixes in a pool: names, who is given up first, and law 2 with cached blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from phasewise.engine.blocks import BlockAllocator, BlockCounts
from phasewise.engine.prefix import (
    MAX_JOURNAL,
    SHORT_MASK,
    PrefixIndex,
    extend_hashes,
    pack_hashes,
    unpack_hashes,
)
from phasewise.engine.prefix_cache import PrefixCache
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence


def taken(blocks: list[int] | None) -> list[int]:
    assert blocks is not None
    return blocks


def sequence(tokens: list[int], name: str = "a", cache_salt: str = "") -> Sequence:
    return Sequence(
        Request(
            id=name,
            token_ids=tuple(tokens),
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(),
            cache_salt=cache_salt,
        )
    )


def served(cache: PrefixCache, tokens: list[int], **options: str) -> Sequence:
    """A prompt admitted and computed."""
    made = sequence(tokens, **options)
    assert cache.admit(made, cache.find(made))
    start, made.num_computed = made.num_computed, made.num_tokens
    cache.computed(made, start)
    return made


def test_a_name_stands_for_all_tokens_before_it_and_is_made_once() -> None:
    tokens = list(range(100))
    whole = extend_hashes([], tokens, 16)
    assert len(whole) == 6
    grown = extend_hashes([], tokens[:40], 16)
    assert grown == whole[:2] and extend_hashes(grown, tokens, 16) == whole
    other = extend_hashes([], [7, *tokens[1:]], 16)
    assert not set(other) & set(whole)
    assert not set(extend_hashes([], tokens, 16, "tenant")) & set(whole)


@given(st.lists(st.integers(0, 2**128 - 1)))
def test_names_come_off_the_wire_as_they_went(hashes: list[int]) -> None:
    assert unpack_hashes(pack_hashes(hashes)) == hashes
    assert unpack_hashes(pack_hashes(hashes) + b"cut") == hashes


def test_a_released_prompt_is_cached_and_found_again() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    cache = PrefixCache(allocator)
    first = served(cache, list(range(10)))
    blocks = list(first.blocks)
    cache.drop(first)
    assert allocator.counts() == BlockCounts(total=20, free=18, active=0, cached=2, leased=0)
    again = served(cache, list(range(10)))
    assert again.blocks[:2] == blocks[:2] and again.cached_tokens == 8
    assert cache.find(sequence(list(range(9)), cache_salt="tenant")) == []


def test_one_token_is_always_left_to_compute() -> None:
    cache = PrefixCache(BlockAllocator(20, 4, prefix_cache=True))
    cache.drop(served(cache, list(range(12))))
    again = sequence(list(range(12)))
    assert cache.admit(again, cache.find(again))
    assert again.num_computed == 8 and len(again.blocks) == 3


def test_the_least_recently_used_leaf_goes_first_and_never_a_parent_before_its_child() -> None:
    allocator = BlockAllocator(6, 4, prefix_cache=True)
    cache = PrefixCache(allocator)
    shared = list(range(4))
    old = served(cache, [*shared, 10, 11, 12, 13], name="old")
    cache.drop(old)
    cache.drop(served(cache, [*shared, 20, 21, 22, 23, 24, 25, 26, 27], name="new"))
    assert allocator.counts().cached == 4
    found = [len(cache.find(sequence([*shared, *tail, 0]))) for tail in ([10, 11, 12, 13],)]
    assert found == [2]
    held = taken(allocator.allocate(3))  # two were free
    assert len(cache.find(sequence([*shared, 10, 11, 12, 13, 0]))) == 1, "the old leaf went"
    assert len(cache.find(sequence([*shared, *range(20, 28), 0]))) == 3
    held += taken(allocator.allocate(2))
    assert len(cache.find(sequence([*shared, *range(20, 28), 0]))) == 1, "leaves before the root"
    allocator.check()
    assert allocator.allocate(2) is None and allocator.counts().cached == 1


def test_what_comes_from_elsewhere_stands_in_one_place_with_what_was_here() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    cache = PrefixCache(allocator)
    here = served(cache, list(range(9)))
    coming = sequence(list(range(8)) + [50, 51, 52, 53, 54], name="b")
    coming.blocks = taken(allocator.lease(4))
    allocator.activate(coming.blocks)
    coming.num_computed = 12
    cache.arrived(coming)
    assert coming.blocks[:2] == here.blocks[:2]
    assert allocator.counts().active == 5
    assert len(cache.find(sequence([*range(8), 50, 51, 52, 53, 0]))) == 3
    allocator.check()


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    cache = PrefixCache(BlockAllocator(20, 4, prefix_cache=True))
    first = sequence(list(range(10)))
    assert cache.admit(first, [])
    second = sequence([*range(8), 70, 71], name="b")
    assert cache.who_computes(second) == "a"
    assert cache.who_computes(sequence([9, *range(8)], name="c")) is None
    first.num_computed = 4
    cache.computed(first, 0)
    assert cache.who_computes(second) == "a"
    cache.drop(first)
    assert cache.who_computes(second) is None
    assert len(cache.find(second)) == 1, "only what was complete"


def test_names_given_from_outside_serve_sequences_without_tokens() -> None:
    cache = PrefixCache(BlockAllocator(20, 4, prefix_cache=True))
    for expected in (0, 2):
        made = sequence(list(range(10)))
        made.tokens, made.block_hashes = None, [5, 6]
        assert cache.admit(made, cache.find(made))
        assert len(cache.find(made)) == expected
        made.num_computed = 10
        cache.drop(made)


def test_without_a_cache_everything_is_free_again() -> None:
    allocator = BlockAllocator(20, 4)
    cache = PrefixCache(allocator)
    made = served(cache, list(range(10)))
    assert not made.block_hashes and cache.find(made) == []
    cache.drop(made)
    assert allocator.counts().free == 20


def test_a_reader_of_the_news_knows_what_is_known() -> None:
    allocator = BlockAllocator(8, 4, prefix_cache=True)
    cache, index = PrefixCache(allocator), allocator.prefixes
    assert index is not None
    seen: set[int] = set()
    cursor = -1
    for turn in range(12):
        cache.drop(served(cache, [turn // 2] * (4 + 4 * (turn % 3))))
        news = index.news(cursor)
        assert news.reset == (cursor < 0)
        seen = (set() if news.reset else seen - set(news.removed)) | set(news.added)
        cursor = news.cursor
        assert seen == {name & SHORT_MASK for name in index.news(-1).added}
        assert len(seen) == len(index)


def test_a_reader_too_far_behind_starts_anew() -> None:
    index = PrefixIndex(1)
    for name in range(MAX_JOURNAL):
        index.enter(0, name, -1)
        index.idle(0)
        index.evict()
    assert index.news(0).reset
    assert not index.news(2 * MAX_JOURNAL - 3).reset


class PrefixLaws(RuleBasedStateMachine):
    """Sequences of a few prefixes come, grow and go, some from elsewhere; whoever finds a block
    finds what was written there under that name, and all that is idle can be had."""

    @initialize(num_blocks=st.integers(1, 30))
    def start(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks, 2, prefix_cache=True)
        self.cache = PrefixCache(self.allocator)
        self.live: list[Sequence] = []
        self.leased: list[list[int]] = []
        self.written: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.serial = 0

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=16)

    def write(self, made: Sequence, start: int) -> None:
        assert made.tokens is not None
        for at in range(start // 2, made.num_computed // 2):
            self.written[made.blocks[at]] = tuple(made.tokens[: 2 * at + 2])

    @rule(tokens=tokens)
    def admit(self, tokens: list[int]) -> None:
        self.serial += 1
        made = sequence(tokens, name=str(self.serial))
        before = self.allocator.counts()
        found = self.cache.find(made)
        if not self.cache.admit(made, found):
            assert self.allocator.counts() == before
            return
        for at, block in enumerate(found):
            assert self.written[block] == tuple(tokens[: 2 * at + 2])
        assert made.num_uncomputed > 0
        self.live.append(made)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 8))
    def compute(self, data: st.DataObject, count: int) -> None:
        made = data.draw(st.sampled_from(self.live))
        start = made.num_computed
        made.num_computed = min(made.num_tokens, start + count)
        self.write(made, start)
        self.cache.computed(made, start)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def generate(self, data: st.DataObject, token: int) -> None:
        made = data.draw(st.sampled_from(self.live))
        if made.num_computed < made.num_tokens:
            return
        made.append(token)
        if made.num_tokens > 2 * len(made.blocks) and not self.allocator.extend(made.blocks):
            assert self.allocator.num_available == 0
            made.num_tokens -= 1
            assert made.tokens is not None
            made.tokens.pop()
            return
        made.num_computed += 1
        self.write(made, made.num_computed - 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        made = data.draw(st.sampled_from(self.live))
        self.live.remove(made)
        self.cache.drop(made)

    @rule(tokens=tokens)
    def come_from_elsewhere(self, tokens: list[int]) -> None:
        blocks = self.allocator.lease(self.allocator.blocks_for(len(tokens)))
        if blocks is None:
            return
        self.serial += 1
        made = sequence([*tokens, 0], name=str(self.serial))
        self.allocator.activate(blocks)
        made.blocks, made.num_computed = blocks, len(tokens)
        self.write(made, 0)
        self.cache.arrived(made)
        for at in range(len(tokens) // 2):
            assert self.written[made.blocks[at]] == tuple(tokens[: 2 * at + 2])
        if len(tokens) % 2 == 0:
            assert self.allocator.extend(made.blocks) or not self.allocator.num_available
            if len(made.blocks) * 2 < made.num_tokens:
                self.cache.drop(made)
                return
        self.live.append(made)

    @rule(count=st.integers(1, 6))
    def lease(self, count: int) -> None:
        possible = count <= self.allocator.num_available
        blocks = self.allocator.lease(count)
        assert (blocks is not None) == possible
        if blocks is not None:
            self.leased.append(blocks)
            for block in blocks:
                self.written.pop(block, None)

    @precondition(lambda self: self.leased)
    @rule()
    def unlease(self) -> None:
        self.allocator.unlease(self.leased.pop())

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check()
        self.allocator.check_held(made.blocks for made in self.live)
        self.cache.check({made.id for made in self.live})
        assert self.allocator.counts().leased == sum(map(len, self.leased))

    def teardown(self) -> None:
        """Every idle block can be had."""
        if not hasattr(self, "allocator"):
            return
        while self.live:
            self.cache.drop(self.live.pop())
        while self.leased:
            self.unlease()
        assert len(taken(self.allocator.allocate(self.allocator.num_blocks))) > 0
        self.allocator.check()


TestPrefixLaws = PrefixLaws.TestCase
TestPrefixLaws.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("count", [1, 5])
def test_a_shared_block_that_is_free_fails_an_assertion(count: int) -> None:
    with pytest.raises(AssertionError):
        BlockAllocator(8, 16, prefix_cache=True).share(list(range(count)))
