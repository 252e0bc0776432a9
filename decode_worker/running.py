"""The sequences that hold blocks on a decode worker: who has a row, who grows, who must go."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ..engine.batch import Batch, Progress
from ..engine.order import Line, Waiter
from ..engine.prefix_cache import PrefixCache
from ..engine.sequence import Sequence
from .steady import SteadyRows

Ending = tuple[Sequence, int]  # a sequence and the token that may end it


class Running:
    """Rows of the next step, and the sequences that wait for a row with their KV here."""

    def __init__(self, prefix: PrefixCache, waiters: Mapping[str, Waiter]) -> None:
        self.prefix = prefix
        self.allocator = prefix.allocator
        self.waiters = waiters  # the scheduler's, read only
        self.decoding: dict[Sequence, None] = {}  # all tokens but the last computed
        self.steady = SteadyRows(self.allocator)  # the first of decoding, in a simulator
        self.prefilling: list[Sequence] = []  # chunk by chunk, in order of admission
        self.ready = Line()  # as decoding, but without a place in the batch
        self.context_tokens = 0  # computed tokens of decoding and prefilling
        self.preemptions = 0

    @property
    def num_rows(self) -> int:
        """Places taken in the batch."""
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_here(self) -> int:
        """Sequences that hold blocks."""
        return self.num_rows + len(self.ready)

    def place_ready(self, max_batch_size: int) -> None:
        """Give free places to those whose KV is here."""
        while (waiter := self.ready.first) is not None and self.num_rows < max_batch_size:
            self.ready.remove(waiter)
            self.decoding[waiter.sequence] = None
            self.context_tokens += waiter.sequence.num_computed

    def grow(self) -> tuple[list[Sequence], list[Waiter]]:
        """Give each decoding row the block it needs; returns the rows, and who was preempted.

        A row is left out of this step if it needs a block while nobody is left to preempt:
        then remote writers hold the rest, and their leases end.
        """
        block_size, allocator = self.allocator.block_size, self.allocator
        preempted: list[Waiter] = []
        stalled: list[Sequence] = []
        for sequence in [row for row in self.decoding if not row.num_computed % block_size]:
            # Without blocks it was preempted for another row a moment ago.
            if not sequence.blocks or sequence.num_computed < len(sequence.blocks) * block_size:
                continue
            while not allocator.extend(sequence.blocks):
                victim = self._victim()
                if victim is None:
                    assert allocator.counts().leased, "the pool holds no single such sequence"
                    stalled.append(sequence)
                    break
                self._preempt(victim)
                preempted.append(victim)
                if victim.sequence is sequence:
                    break
        if stalled:
            return [row for row in self.decoding if row not in stalled], preempted
        return list(self.decoding), preempted

    def go_on(self, former: Batch, doomed: Container[str], at_least: int) -> Batch | None:
        """The step after `former`, which is in flight and whose every row decodes: the same rows a
        position on, each with its block, but for the doomed and those that have their last token
        then. None where fewer than `at_least` are left, somebody was left out of `former` or is
        computed in chunks, a row needs the token before, or a block is lacking.
        """
        if former.num_rows < self.num_rows:
            return None
        if former.follows is None:  # else they are rows of one that was looked at
            draws = [row.request.sampling.is_plain_draw for row in former.sequences]
            if not all(draws):
                return None
        block_size, allocator = self.allocator.block_size, self.allocator
        follows, sequences, starts, growing = [], [], [], []
        for row, sequence in enumerate(former.sequences):
            start = former.starts[row] + 1
            if start + 1 >= sequence.max_total_tokens or sequence.id in doomed:
                continue
            follows.append(row)
            sequences.append(sequence)
            starts.append(start)
            if start == len(sequence.blocks) * block_size:
                growing.append(sequence)
        if len(follows) < at_least or len(growing) > allocator.num_available:
            return None
        for sequence in growing:
            extended = allocator.extend(sequence.blocks)
            assert extended, "num_available says so"
        return Batch(sequences=sequences, starts=starts, counts=[1] * len(follows), follows=follows)

    def enter(self, sequence: Sequence) -> None:
        """A sequence has its blocks and is computed here, from behind what it found cached."""
        self.prefilling.append(sequence)
        self.context_tokens += sequence.num_computed

    def advance_rows(
        self, rows: list[Sequence], token_ids: list[int], stop_token_ids: set[int]
    ) -> list[Ending]:
        """Each decoding row takes its token (chunks' tokens come after); returns possible ends."""
        endings = []
        for sequence, token_id in zip(rows, token_ids, strict=False):
            sequence.num_computed += 1
            sequence.num_tokens = num_tokens = sequence.num_tokens + 1
            if sequence.tokens is not None:
                sequence.tokens.append(token_id)
            if num_tokens >= sequence.max_total_tokens or token_id in stop_token_ids:
                endings.append((sequence, token_id))
        self.context_tokens += len(rows)
        return endings

    def advance_chunks(
        self, batch: Batch, token_ids: list[int], progress: Progress, doomed: Container[str]
    ) -> list[Ending]:
        """Chunks, behind the rows that stand in `progress`, are computed: sequences with all tokens
        computed are decoding now and take theirs; returns these possible ends. What the `doomed`
        computed is not kept.
        """
        endings = []
        for row in range(len(progress.rows), batch.num_rows):
            sequence = batch.sequences[row]
            sequence.num_computed += batch.counts[row]
            self.context_tokens += batch.counts[row]
            if sequence.id not in doomed:
                self.prefix.computed(sequence, batch.starts[row])
            if sequence.num_computed == sequence.num_tokens:
                self.prefilling.remove(sequence)
                self.decoding[sequence] = None
                sequence.append(token_ids[row])
                progress.add(sequence, token_ids[row], row)
                endings.append((sequence, token_ids[row]))
        return endings

    def steady_steps(self) -> int:
        """Steps of `steady` with all who decode; 0 where somebody cannot take part."""
        decoding, steady = self.decoding, self.steady
        if len(steady) < len(decoding):
            for row in list(decoding)[len(steady) :]:
                if not steady.join(row):
                    return 0
        return steady.num_steps() if decoding else 0

    def advance_steadily(self, num_steps: int) -> None:
        self.steady.take(num_steps)
        self.context_tokens += num_steps * len(self.decoding)

    def leave(self, sequence: Sequence, num_complete: int | None = None) -> None:
        """Take a sequence's place and blocks; its first `num_complete` positions, or all that are
        computed, stay in the prefix cache as long as there is room."""
        if sequence in self.steady:
            self.steady.leave(sequence)
        if sequence in self.decoding:
            del self.decoding[sequence]
        else:
            self.prefilling.remove(sequence)
        self.context_tokens -= sequence.num_computed
        self.prefix.drop(sequence, num_complete)

    def leave_ready(self, waiter: Waiter) -> None:
        self.ready.remove(waiter)
        self.prefix.drop(waiter.sequence)

    def check(self) -> None:
        """Assert the laws of rows, and of who waits for one."""
        rows, ready = [*self.decoding, *self.prefilling], [waiter.sequence for waiter in self.ready]
        for sequence in [*self.decoding, *ready]:
            assert sequence.num_uncomputed == 1, sequence.id
        for sequence in [*rows, *ready]:
            capacity = len(sequence.blocks) * self.allocator.block_size
            assert 0 <= sequence.num_computed <= capacity
        assert sum(row.num_computed for row in rows) == self.context_tokens
        self.prefix.check({row.id for row in self.prefilling})

    def _victim(self) -> Waiter | None:
        """Lowest priority class, then latest arrival; never the oldest of all."""
        running = [self.waiters[row.id] for row in (*self.decoding, *self.prefilling)]
        here = [*running, *self.ready]
        oldest = min(waiter.serial for waiter in here)
        return max(
            (waiter for waiter in here if waiter.serial != oldest),
            key=lambda waiter: waiter.rank,
            default=None,
        )

    def _preempt(self, waiter: Waiter) -> None:
        sequence = waiter.sequence
        if waiter.line is self.ready:
            self.leave_ready(waiter)
        else:
            self.leave(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.preemptions += 1
