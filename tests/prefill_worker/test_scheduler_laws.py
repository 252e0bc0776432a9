"""Any sequence of calls on a prefill scheduler keeps the laws, and everything ends once."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import StepCoefficients
from phasewise.prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from phasewise.tests.engine.shadow_pool import ShadowPool

EOS = 2
STEP_TIME = StepCoefficients(base_s=0.01, new_token_s=0.001)


class PrefillLaws(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 24),
        max_batch_tokens=st.integers(1, 40),
        max_batch_size=st.integers(1, 5),
        max_wait_s=st.sampled_from([0.0, 1.0, 50.0]),
        predicts=st.booleans(),
        caches=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_batch_tokens: int,
        max_batch_size: int,
        max_wait_s: float,
        predicts: bool,
        caches: bool,
    ) -> None:
        self.limits = PrefillLimits(
            max_batch_tokens=max_batch_tokens,
            max_model_len=200,
            eos_token_ids=frozenset({EOS}),
            max_batch_size=max_batch_size,
            ttft_ms=500,
            max_wait_s=max_wait_s,
        )
        self.allocator = BlockAllocator(num_blocks, 4, prefix_cache=caches)
        self.shadow = ShadowPool(4)
        step_time = STEP_TIME if predicts else None
        self.prefill = PrefillScheduler(self.allocator, self.limits, step_time)
        self.now_s = 0.0
        self.batch: Batch | None = None
        self.serial = 0
        self.open: dict[str, Sequence] = {}
        self.parked: dict[str, Sequence] = {}
        self.aborted: set[str] = set()

    @rule(
        num_tokens=st.integers(1, 60),
        ttft_ms=st.sampled_from([0, 50, 500, 5000]),
        priority=st.integers(0, 1),
        max_tokens=st.integers(1, 3),
        own_from=st.integers(0, 60),
        cache_salt=st.sampled_from(["", "", "another"]),
    )
    def add(
        self,
        num_tokens: int,
        ttft_ms: int,
        priority: int,
        max_tokens: int,
        own_from: int,
        cache_salt: str,
    ) -> None:
        if not self.prefill.fits(num_tokens):
            return
        self.serial += 1
        request = Request(
            id=str(self.serial),
            # Prompts share their first `own_from` tokens.
            token_ids=tuple(
                10 + at + (1000 * self.serial if at >= own_from else 0) for at in range(num_tokens)
            ),
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=max_tokens),
            arrival_s=self.now_s,
            ttft_ms=ttft_ms,
            priority=priority,
            cache_salt=cache_salt,
        )
        self.open[request.id] = Sequence(request)
        self.prefill.add(self.open[request.id], self.now_s)

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        assert self.prefill.abort(name)
        assert not self.prefill.abort(name)
        del self.open[name]
        self.aborted.add(name)

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.parked)))
        self.prefill.release(name)
        assert not self.parked.pop(name).blocks

    @precondition(lambda self: self.batch is None)
    @rule()
    def next_batch(self) -> None:
        self.batch = batch = self.prefill.next_batch(self.now_s)
        if batch is None:
            return
        assert 0 < batch.num_tokens <= self.limits.max_batch_tokens
        assert batch.num_rows <= self.limits.max_batch_size
        assert len({row.id for row in batch.sequences}) == batch.num_rows
        for row, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            assert row.id in self.open
            assert start == row.num_computed and 0 < count <= row.num_uncomputed
            assert len(row.blocks) * 4 >= start + count
        self.shadow.compute(batch)

    @precondition(lambda self: self.batch is not None)
    @rule(token_id=st.sampled_from([7, EOS]))
    def advance(self, token_id: int) -> None:
        batch, self.batch = self.batch, None
        assert batch is not None
        sampled = [row for row in range(batch.num_rows) if batch.samples(row)]
        expected = [batch.sequences[row] for row in sampled if batch.sequences[row].id in self.open]
        token_ids = [token_id if batch.samples(row) else -1 for row in range(batch.num_rows)]
        progress = self.prefill.advance(batch, StepOutput(token_ids=token_ids), self.now_s)
        assert progress.sequences == expected
        finished = {sequence.id for sequence, _ in progress.finished}
        for sequence, row in zip(progress.sequences, progress.rows, strict=True):
            assert batch.sequences[row] is sequence
            assert sequence.num_computed == sequence.num_tokens - 1 == sequence.num_prompt_tokens
            ended = token_id == EOS or sequence.request.sampling.max_tokens == 1
            assert (sequence.id in finished) == ended
            self.open.pop(sequence.id)
            if not ended:
                self.parked[sequence.id] = sequence

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "prefill"):
            return
        self.prefill.check()
        for sequence in self.parked.values():
            self.shadow.check(sequence, sequence.num_computed)
            assert len(sequence.blocks) == -(-sequence.num_computed // 4)

    def teardown(self) -> None:
        """With no more arrivals everything ends, in a bounded number of steps."""
        if not hasattr(self, "prefill"):
            return
        tokens = sum(sequence.num_tokens for sequence in self.open.values())
        for _ in range(2 * tokens + 2 * len(self.open) + 2):
            if self.batch is None:
                self.next_batch()
            if self.batch is not None:
                self.advance(7)
            self.laws()
            for name in list(self.parked):
                self.prefill.release(name)
                del self.parked[name]
            if not self.open and self.batch is None:
                break
        assert not self.open, "someone starves"
        assert self.allocator.num_available == self.allocator.num_blocks
        load = self.prefill.load()
        assert (load.running, load.waiting, load.queued_tokens, load.context_tokens) == (0,) * 4


TestPrefillLaws = PrefillLaws.TestCase
TestPrefillLaws.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
