"""Any sequence of calls on a decode scheduler keeps the laws, and everything ends once."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import FinishReason, Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import StepCoefficients
from phasewise.tests.engine.shadow_pool import ShadowPool

BLOCK_SIZE = 4
EOS = 2
STEP_TIME = StepCoefficients(base_s=0.01, new_token_s=0.001, decode_row_s=0.001)


class DecodeLaws(RuleBasedStateMachine):
    """Small pools, so that preemption, waiting and stalls are ordinary."""

    @initialize(
        num_blocks=st.integers(3, 24),
        max_batch_size=st.integers(1, 5),
        more_tokens=st.integers(1, 30),
        max_wait_s=st.sampled_from([0.0, 1.0, 50.0]),
        tpot_ms=st.sampled_from([0.0, 15.0, 40.0]),
        caches=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_batch_size: int,
        more_tokens: int,
        max_wait_s: float,
        tpot_ms: float,
        caches: bool,
    ) -> None:
        self.limits = DecodeLimits(
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_size + more_tokens,
            max_model_len=60,
            eos_token_ids=frozenset({EOS}),
            ttft_ms=500,
            tpot_ms=tpot_ms,
            max_wait_s=max_wait_s,
        )
        self.allocator = BlockAllocator(num_blocks, BLOCK_SIZE, prefix_cache=caches)
        self.shadow = ShadowPool(BLOCK_SIZE)
        self.decode = DecodeScheduler(self.allocator, self.limits, STEP_TIME if tpot_ms else None)
        self.now_s = 0.0
        self.serial = 0
        self.batch: Batch | None = None
        self.following: Batch | None = None
        self.had_token: dict[str, int] = {}  # its preemptions when it got its last token
        self.open: dict[str, Sequence] = {}  # in the scheduler's hands
        self.grants: list[tuple[Sequence, list[int]]] = []  # pushes under way
        self.prefixes: dict[str, list[int]] = {}  # what grants found to be here, by sequence
        self.fetches: list[tuple[Sequence, list[int]]] = []
        self.orphans: list[list[int]] = []  # leased, their sequence aborted

    def make(
        self, num_tokens: int, max_tokens: int, priority: int, own_from: int, cache_salt: str
    ) -> Sequence | None:
        if not self.decode.fits(num_tokens + max_tokens) or num_tokens + max_tokens > 60:
            return None
        self.serial += 1
        request = Request(
            id=str(self.serial),
            # Prompts share their first `own_from` tokens.
            token_ids=tuple(
                10 + at + (1000 * self.serial if at >= own_from else 0) for at in range(num_tokens)
            ),
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=(3,)),
            arrival_s=self.now_s,
            priority=priority,
            cache_salt=cache_salt,
        )
        return Sequence(request)

    @rule(
        how=st.sampled_from(["add", "push", "room"]),
        num_tokens=st.integers(1, 40),
        max_tokens=st.integers(2, 20),
        priority=st.integers(0, 1),
        own_from=st.integers(0, 40),
        cache_salt=st.sampled_from(["", "", "another"]),
    )
    def arrive(
        self,
        how: str,
        num_tokens: int,
        max_tokens: int,
        priority: int,
        own_from: int,
        cache_salt: str,
    ) -> None:
        sequence = self.make(num_tokens, max_tokens, priority, own_from, cache_salt)
        if sequence is None:
            return
        if how == "add":
            self.open[sequence.id] = sequence
            self.decode.add(sequence, self.now_s)
            return
        blocks = self.grant(sequence) if how == "push" else None
        sequence.append(7)
        if blocks is not None:
            self.grants.append((sequence, blocks))
        else:
            self.open[sequence.id] = sequence
            self.decode.wait_for_room(sequence, self.now_s)

    def grant(self, sequence: Sequence) -> list[int] | None:
        """Blocks for a push: all of them, or those behind what is here already."""
        num_blocks = self.allocator.blocks_for(sequence.num_tokens)
        if self.allocator.prefixes is None:
            blocks = self.decode.lease(sequence.num_tokens)
            assert blocks is None or len(blocks) == num_blocks
            return blocks
        hashes = self.decode.prefix.shareable(sequence, sequence.num_tokens)
        found = self.decode.lease_behind(num_blocks, hashes)
        if found is None:
            return None
        self.prefixes[sequence.id], blocks = found
        assert len(found[0]) + len(blocks) == num_blocks and blocks
        self.shadow.spoil(blocks)
        return blocks

    @rule()
    def fetch(self) -> None:
        for sequence, blocks in self.decode.next_fetches(self.now_s):
            num_blocks = self.allocator.blocks_for(sequence.num_tokens - 1)
            assert len(sequence.blocks) + len(blocks) == num_blocks and blocks
            assert sequence.id in self.open
            self.shadow.spoil(blocks)
            self.fetches.append((sequence, blocks))

    @precondition(lambda self: self.grants or self.fetches)
    @rule(data=st.data(), arrives=st.booleans())
    def end_transfer(self, data: st.DataObject, arrives: bool) -> None:
        transfer = data.draw(st.sampled_from([*self.grants, *self.fetches]))
        sequence, blocks = transfer
        pushed = transfer in self.grants
        (self.grants if pushed else self.fetches).remove(transfer)
        if arrives:
            self.arrived(sequence, blocks)
            return
        if pushed:
            self.decode.unhold(self.prefixes.pop(sequence.id, []))
        else:
            assert self.decode.abort(sequence.id)
            del self.open[sequence.id]
        self.orphans.append(blocks)

    def arrived(self, sequence: Sequence, blocks: list[int]) -> None:
        self.open[sequence.id] = sequence
        self.had_token[sequence.id] = sequence.num_preemptions
        sequence.blocks = self.prefixes.pop(sequence.id, sequence.blocks)
        num_here = len(sequence.blocks) * BLOCK_SIZE
        num_tokens = sequence.num_tokens - 1
        self.shadow.write(sequence, num_here, num_tokens, [*sequence.blocks, *blocks])
        self.decode.resume(sequence, blocks, self.now_s)

    @precondition(lambda self: self.orphans)
    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.orphans))
        self.orphans.remove(blocks)
        self.decode.unlease(blocks)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        assert self.decode.abort(name)
        assert not self.decode.abort(name)
        del self.open[name]
        for fetch in [fetch for fetch in self.fetches if fetch[0].id == name]:
            self.fetches.remove(fetch)
            self.orphans.append(fetch[1])

    @precondition(lambda self: self.batch is None)
    @rule()
    def next_batch(self) -> None:
        self.batch = batch = self.decode.next_batch(self.now_s)
        if batch is None:
            return
        assert 0 < batch.num_tokens <= self.limits.max_batch_tokens
        assert batch.num_rows <= self.limits.max_batch_size
        assert len({row.id for row in batch.sequences}) == batch.num_rows
        for row, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            assert row.id in self.open
            assert start == row.num_computed and 0 < count <= row.num_uncomputed
            assert len(row.blocks) * BLOCK_SIZE >= start + count
        self.shadow.compute(batch)
        decoding = [self.had_token.get(s.id) == s.num_preemptions for s in batch.sequences]
        assert decoding == sorted(decoding, reverse=True), "decoding rows stand before chunks"

    @precondition(lambda self: self.batch is not None and self.following is None)
    @rule()
    def look_ahead(self) -> None:
        former = self.batch
        assert former is not None
        self.following = batch = self.decode.next_batch(self.now_s)
        if batch is None:
            return
        assert batch.follows is not None and set(batch.counts) == {1}
        for row, start, place in zip(batch.sequences, batch.starts, batch.follows, strict=True):
            assert row is former.sequences[place] and start == former.starts[place] + 1
            assert row.id in self.open and start + 1 < row.max_total_tokens
            assert len(row.blocks) * BLOCK_SIZE > start

    @precondition(lambda self: self.following is not None)
    @rule()
    def take_back(self) -> None:
        self.following = None
        self.decode.in_flight.take_back()

    @precondition(lambda self: self.batch is not None)
    @rule(
        token_id=st.sampled_from([7, 7, 7, 7, 7, 7, 7, 7, EOS, 3]), every=st.sampled_from([1, 2, 3])
    )
    def advance(self, token_id: int, every: int = 1) -> None:
        """Each `every`-th row gets the token, the others one that ends nothing."""
        batch, self.batch, self.following = self.batch, self.following, None
        assert batch is not None
        if batch.follows is not None:  # it may have written until now
            self.shadow.compute(batch)
        known = [row.num_tokens for row in batch.sequences]
        sampled = [row for row in range(batch.num_rows) if batch.samples(row)]
        expected = [row for row in sampled if batch.sequences[row].id in self.open]
        token_ids = [-1] * batch.num_rows
        for row in sampled:
            token_ids[row] = 7 if row % every else token_id
        progress = self.decode.advance(batch, StepOutput(token_ids=token_ids), self.now_s)
        assert progress.rows == expected
        assert progress.sequences == [batch.sequences[row] for row in expected]
        assert progress.token_ids == [token_ids[row] for row in expected]
        ended = dict(progress.finished)
        for row in expected:
            sequence = batch.sequences[row]
            assert sequence.num_tokens == known[row] + 1
            assert sequence.tokens is not None and len(sequence.tokens) == sequence.num_tokens
            assert sequence.num_computed == sequence.num_tokens - 1
            self.had_token[sequence.id] = sequence.num_preemptions
            full = sequence.num_tokens == sequence.request.max_total_tokens
            stops = token_ids[row] != 7
            reason = FinishReason.STOP if stops else FinishReason.LENGTH if full else None
            assert ended.get(sequence) == reason
            if reason is not None:
                del self.open[sequence.id]
        if self.batch is not None:  # it has what it computes, and begins
            self.shadow.compute(self.batch)

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "decode"):
            return
        self.decode.check()
        leased = [*(b for _, b in self.grants), *(b for _, b in self.fetches), *self.orphans]
        assert self.allocator.counts().leased == sum(map(len, leased))
        for step in (self.batch, self.following):
            for row in step.sequences if step is not None else ():
                assert row.blocks, "a step in flight writes to blocks of its own"
        load = self.decode.load()
        if self.batch is None:
            assert load.running + load.waiting == len(self.open)

    def teardown(self) -> None:
        """With no more arrivals everything ends, in a bounded number of steps."""
        if not hasattr(self, "decode"):
            return
        # At worst one at a time, each in chunks of one token and preempted by each of the others.
        bound = 60 * (len(self.open) + len(self.grants) + 1) ** 2 + 60
        for _ in range(bound):
            while self.orphans:
                self.decode.unlease(self.orphans.pop())
            self.fetch()
            for transfers in (self.grants, self.fetches):
                while transfers:
                    sequence, blocks = transfers.pop()
                    self.arrived(sequence, blocks)
            if self.batch is None:
                self.next_batch()
            if self.batch is not None and self.following is None:
                self.look_ahead()
            if self.batch is not None:
                self.advance(7)
            self.laws()
            if not self.open and self.batch is None:
                break
        assert not self.open, "someone starves"
        assert self.allocator.num_available == self.allocator.num_blocks
        load = self.decode.load()
        assert (load.running, load.waiting, load.queued_tokens, load.context_tokens) == (0,) * 4


TestDecodeLaws = DecodeLaws.TestCase
TestDecodeLaws.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
