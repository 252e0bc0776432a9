"""Which rows a decode worker computes next. Decides only: no clock, tensor, socket or log.

Policy, per step:

1. Every running decode has a row, up to `max_batch_size` sequences in all. Those whose KV is
   here and that wait for a place come first by priority class, then arrival.
2. A row that needs a block and finds none preempts: the lowest priority class first, then
   whoever arrived last, which has least to compute again and stands in nobody's way. The
   oldest sequence here is never preempted, so it always makes progress, and so does each in
   its turn. It is computed again here from all its known tokens.
3. Then chunks, stall-free (Sarathi-Serve, OSDI '24): prompts in progress, preempted sequences,
   new prompts by earliest first-token deadline, late ones last. How much: `chunking`.
   Who may come in: `admission`.

While a step is in flight whose rows all decode, the next one may be given out before its tokens
are known, where nobody could come in: the same rows, a position on. Whoever comes meanwhile waits
for that one step more, if it has begun: else the worker takes it back (`in_flight`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..engine.batch import Batch, Progress, StepOutput
from ..engine.blocks import BlockAllocator
from ..engine.load import SchedulerLoad
from ..engine.order import Waiter
from ..engine.prefix_cache import PrefixCache
from ..engine.sequence import Sequence
from ..engine.step_time import StepTime, features_of, prefill_s
from ..engine.step_time_online import OnlineStepTime
from .admission import Admission
from .chunking import chunks_of, step_budget
from .grants import Grants
from .in_flight import InFlight
from .limits import DecodeLimits
from .running import Running

_INFINITE = float("inf")


class DecodeScheduler:
    """Sequences come in by `add`, `resume` or `wait_for_room`, and run until they end.

    A step is in flight from `next_batch` to `advance`, and at most one more that follows it; every
    other call may come in between. Times are seconds on the caller's clock, that of
    `Request.arrival_s`.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        limits: DecodeLimits,
        step_time: StepTime | None = None,
    ) -> None:
        """Without `step_time` chunks fill the step and nothing is predicted to be late."""
        assert 0 < limits.max_batch_size < limits.max_batch_tokens, limits
        self._allocator = allocator
        self._limits = limits
        self._step_time = step_time
        self._waiters: dict[str, Waiter] = {}  # every sequence here, whatever its state
        self.prefix = PrefixCache(allocator)
        self._admission = Admission(self.prefix, limits.max_wait_s)
        self._fetching: set[str] = set()  # room was found, KV is on its way
        self._running = Running(self.prefix, self._waiters)
        self._grants = Grants(self.prefix, self._admission)
        self.in_flight = InFlight(limits.max_batch_size)
        # Tokens that may end some sequence here; only these are worth the exact question.
        self._stop_token_ids = set(limits.eos_token_ids)
        self._serial = 0
        self._now_s = 0.0  # of the last call that told

    # What comes in, and goes before its time.

    def fits(self, max_total_tokens: int) -> bool:
        """Whether a sequence can be held here up to this length. Ask before it comes in.

        The length is that of prompt and answer (`Request.max_total_tokens`); longer than
        `max_model_len` it never gets.
        """
        held = min(max_total_tokens, self._limits.max_model_len)
        return 0 < self._allocator.blocks_for(held) <= self._allocator.num_blocks

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Queue a sequence that is computed here from its first token on."""
        assert sequence.num_computed == 0 and not sequence.blocks
        waiter = self._enter(sequence, now_s)
        request, limits = sequence.request, self._limits
        ttft_s = (request.ttft_ms or limits.ttft_ms) / 1e3 or _INFINITE
        predicted_s = 0.0
        if self._step_time is not None:
            tokens = limits.max_batch_tokens
            num_ready = len(self.prefix.find(sequence)) * self._allocator.block_size
            num_left = sequence.num_tokens - num_ready
            predicted_s = prefill_s(self._step_time, num_left, num_ready, tokens)
        deadline_s = request.arrival_s + ttft_s
        self._admission.add_prompt(
            waiter, deadline_s=deadline_s, predicted_s=predicted_s, now_s=now_s
        )

    def lease(self, num_tokens: int) -> list[int] | None:
        """Blocks for a writer that sends `num_tokens` positions; None: no room, or not its turn.

        Belongs to no sequence here: `resume` or `unlease` ends it.
        """
        count = self._allocator.blocks_for(num_tokens)
        if not self._admission.may_lease(count, self._running.num_here, self._now_s):
            return None
        return self._allocator.lease(count)

    def lease_behind(
        self, num_blocks: int, hashes: list[int]
    ) -> tuple[list[int], list[int]] | None:
        """As `lease`, for a sequence of `num_blocks` blocks whose first ones are named by
        `hashes`: those of them that are here already, and leased ones for the rest, at least
        one. `resume` takes a sequence whose blocks are the first; else `unhold` ends them."""
        num_here = self._running.num_here
        return self._grants.lease(num_blocks, hashes, num_here=num_here, now_s=self._now_s)

    def unhold(self, blocks: list[int]) -> None:
        """The prefix that `lease_behind` found is not needed any more."""
        self._grants.drop(blocks)

    def unlease(self, blocks: list[int]) -> None:
        """Free leased blocks: their writer acknowledged the end, or is known dead."""
        self._allocator.unlease(blocks)

    def resume(self, sequence: Sequence, blocks: list[int], now_s: float) -> None:
        """Go on with a sequence whose KV stands in `blocks`, leased until now.

        The KV is that of all known tokens but the last. The sequence is new here, and holds what
        `lease_behind` found for it, or was given out by `next_fetches`.
        """
        if sequence.id in self._fetching:
            self._fetching.remove(sequence.id)
            waiter = self._waiters[sequence.id]
            assert waiter.sequence is sequence
        else:
            waiter = self._enter(sequence, now_s)
            self._grants.take(sequence.blocks)
        self._allocator.activate(blocks)
        sequence.blocks = [*sequence.blocks, *blocks]
        sequence.num_computed = sequence.num_tokens - 1
        assert len(sequence.blocks) >= self._allocator.blocks_for(sequence.num_computed)
        self.prefix.arrived(sequence)
        self._running.ready.push(waiter, waiter.rank)

    def wait_for_room(self, sequence: Sequence, now_s: float) -> None:
        """Hold a sequence whose KV waits elsewhere until `next_fetches` gives it out."""
        assert not sequence.blocks
        self._admission.add_room(self._enter(sequence, now_s), now_s)

    def next_fetches(self, now_s: float) -> list[tuple[Sequence, list[int]]]:
        """Sequences there is room for now, each with the blocks leased for its KV.

        A sequence's own blocks are the beginning that is here already; the leased ones follow.
        Each is then resumed with these blocks; or, when the fetch fails, aborted, and the
        blocks unleased once nobody can write to them.
        """
        self._now_s = now_s
        fetches = []
        num_here = self._running.num_here
        while (found := self._admission.next_fetch(num_here, now_s)) is not None:
            waiter, blocks = found
            self._fetching.add(waiter.sequence.id)
            fetches.append((waiter.sequence, blocks))
            num_here += 1
        return fetches

    def abort(self, sequence_id: str) -> bool:
        """Forget a sequence; False if it is not here (any more).

        Its blocks are free on return, or in the last `advance` of a step that computes it. Those
        that `next_fetches` leased for it stay leased until the caller's `unlease`.
        """
        waiter = self._waiters.get(sequence_id)
        if waiter is None or waiter.doomed:
            return False
        sequence = waiter.sequence
        if sequence_id in self._fetching:
            self._fetching.remove(sequence_id)
            self._allocator.release(sequence.blocks)
            sequence.blocks = []
        elif waiter.line is self._running.ready:
            self._running.leave_ready(waiter)
        elif waiter.line is not None:
            self._admission.remove(waiter)
        elif self.in_flight.computes(sequence):
            self._doom(waiter)
            return True
        else:
            self._running.leave(sequence)
        del self._waiters[sequence_id]
        return True

    # The step.

    def next_batch(self, now_s: float) -> Batch | None:
        """The next step's rows; None when nothing can run before another call brings work.

        With a step in flight: those of the step that follows it, or None where that one's tokens
        must be known first.
        """
        self._now_s = now_s
        if self.in_flight:
            return self._following()
        self.settle()
        self._running.place_ready(self._limits.max_batch_size)
        sequences, preempted = self._running.grow()
        for waiter in preempted:
            self._admission.add_preempted(waiter, now_s)
        starts = [sequence.num_computed for sequence in sequences]
        num_rows = len(sequences)
        counts = [1] * num_rows
        if self._running.prefilling or self._admission.prompts or self._admission.preempted:
            self._add_chunks(sequences, starts, counts, now_s)
        if not sequences:
            return None
        batch = Batch(sequences=sequences, starts=starts, counts=counts)
        return self.in_flight.give_out(batch, num_rows)

    def observe(self, batch: Batch, measured_s: float) -> None:
        """What the oldest step in flight took; a model of step times that learns is taught."""
        if isinstance(self._step_time, OnlineStepTime):
            self._step_time.observe(features_of(batch), measured_s)

    def advance(self, batch: Batch, output: StepOutput, now_s: float) -> Progress:
        """Take a step's result: each row that reached its last known token got one more.

        A finished sequence's blocks are free already, unless the step that follows computes it
        too: then they are when that has advanced, whose token for it is nobody's. Aborted ones
        stand nowhere in Progress.
        """
        num_rows, token_ids = self.in_flight.take(batch), output.token_ids
        self._now_s = now_s
        rows = batch.sequences[:num_rows]
        progress = Progress(
            sequences=rows, token_ids=token_ids[:num_rows], rows=list(range(num_rows))
        )
        doomed = self.in_flight.doomed
        endings = self._running.advance_rows(rows, token_ids, self._stop_token_ids)
        if num_rows < batch.num_rows:
            endings += self._running.advance_chunks(batch, token_ids, progress, doomed)
        if doomed:
            progress.drop(doomed)
            self._end_doomed()
        for sequence, token_id in endings:
            if sequence.id not in doomed:
                self._end_if_due(sequence, token_id, progress)
        return progress

    # Many steps at once, for a simulator.

    def steady_steps(self) -> int:
        """How many steps from now on have exactly the rows of the next one: up to and with the
        first that gives some row its last token. Asked between steps; those whose KV is here take
        their places. Nobody comes in, is preempted, or is computed in chunks in these steps; 0
        where that is not certain. For sequences without tokens, which only their length ends.
        """
        running = self._running
        if self.in_flight or running.prefilling:
            return 0
        running.place_ready(self._limits.max_batch_size)
        if self._admission.num_waiting:
            free_place = running.num_rows < self._limits.max_batch_size
            least = self._admission.least_room(most=64, free_place=free_place)
            if self._admission.has_room(least, running.num_here):
                return 0
        return running.steady_steps()

    def steady_load(self) -> tuple[int, int, bool]:
        """Rows, their context in tokens, and whether anybody waits beside them."""
        rows = self._running.num_rows
        return rows, self._running.context_tokens, len(self._waiters) > rows

    def advance_steady(self, num_steps: int, now_s: float) -> None:
        """Apply that many of the `steady_steps` in one go; `now_s` is the last one's end. The
        effect is that of as many `next_batch` and `advance`, but for which block ids grow where.
        Sequences that have their last token now are here until `end_steady`."""
        self._now_s = now_s
        self._running.advance_steadily(num_steps)

    def end_steady(self) -> list[Sequence]:
        """Let those go that have their last token; to be asked after `advance_steady`."""
        ended = self._running.steady.ended()
        for sequence in ended:
            self._running.leave(sequence)
            del self._waiters[sequence.id]
        return ended

    def settle(self) -> None:
        """Tell the sequences of the steps that were applied to all at once."""
        self._running.steady.settle()

    def load(self) -> SchedulerLoad:
        running = self._running
        return SchedulerLoad(
            running=running.num_rows,
            waiting=len(self._waiters) - running.num_rows,
            queued_tokens=self._admission.queued_tokens
            + sum([sequence.num_uncomputed for sequence in running.prefilling]),
            context_tokens=running.context_tokens,
            preemptions=running.preemptions,
            blocks=self._allocator.counts(),
            hit_tokens=self.prefix.hit_tokens,
            asked_tokens=self.prefix.asked_tokens,
        )

    def check(self) -> None:
        """Assert every law of this scheduler and its allocator. Costs O(blocks + sequences)."""
        self.settle()
        self._allocator.check()
        self._admission.check()
        self._running.check()
        ready = [waiter.sequence for waiter in self._running.ready]
        running = [*self._running.decoding, *self._running.prefilling]
        assert len(running) <= self._limits.max_batch_size
        fetching = [self._waiters[name].sequence for name in self._fetching]
        holders = [*running, *ready, *fetching]
        self._allocator.check_held([*(sequence.blocks for sequence in holders), *self._grants.held])
        num_known = len(running) + len(ready) + len(self._admission) + len(self._fetching)
        assert num_known == len(self._waiters)

    def _enter(self, sequence: Sequence, now_s: float) -> Waiter:
        assert sequence.id not in self._waiters, f"{sequence.id} is here already"
        assert self.fits(sequence.max_total_tokens), f"{sequence.id} can never fit; ask fits()"
        self._now_s = now_s
        # The scheduler owns the sequence now; one bound instead of two to look at each token.
        sequence.max_total_tokens = min(sequence.max_total_tokens, self._limits.max_model_len)
        self._stop_token_ids.update(sequence.request.sampling.stop_token_ids)
        self._serial += 1
        waiter = self._waiters[sequence.id] = Waiter(sequence, self._serial, now_s)
        return waiter

    def _following(self) -> Batch | None:
        """The step after the one in flight, where nothing but that step's tokens is unknown."""
        former = self.in_flight.decodes()
        if former is None:
            return None
        waits = self._running.ready or self._admission.prompts or self._admission.preempted
        at_least = self._limits.max_batch_size if waits else 1  # a free place is for who waits
        batch = self._running.go_on(former, self.in_flight.doomed, at_least)
        return None if batch is None else self.in_flight.give_out(batch, batch.num_rows)

    def _add_chunks(
        self, sequences: list[Sequence], starts: list[int], counts: list[int], now_s: float
    ) -> None:
        """Append chunks to the rows: prompts in progress first, then whoever may come in."""
        budget = step_budget(
            sequences,
            starts,
            num_tokens=self._limits.max_batch_tokens - len(sequences),
            tpot_ms=self._limits.tpot_ms,
            step_time=self._step_time,
        )
        for sequence, count in chunks_of(self._prompts(now_s), budget):
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = now_s
            sequences.append(sequence)
            starts.append(sequence.num_computed)
            counts.append(count)

    def _prompts(self, now_s: float) -> Iterator[Sequence]:
        """Sequences to compute, in order. One that comes in does so when it is asked for."""
        running = self._running
        yield from running.prefilling.copy()
        while running.num_rows < self._limits.max_batch_size:
            waiter = self._admission.next_prefill(running.num_here, now_s)
            if waiter is None:
                return
            running.enter(waiter.sequence)
            yield waiter.sequence

    def _end_if_due(self, sequence: Sequence, token_id: int, progress: Progress) -> None:
        limits = self._limits
        reason = sequence.finish_reason(
            token_id, eos_token_ids=limits.eos_token_ids, max_model_len=limits.max_model_len
        )
        if reason is None:
            return
        progress.finished.append((sequence, reason))
        if self.in_flight.computes(sequence):
            self._doom(self._waiters[sequence.id])
        else:
            self._running.leave(sequence)
            del self._waiters[sequence.id]

    def _doom(self, waiter: Waiter) -> None:
        waiter.doomed = True
        self.in_flight.doom(waiter.sequence)

    def _end_doomed(self) -> None:
        """What ended before its last step came back leaves with that; what was computed of it
        meanwhile is not kept."""
        for sequence, num_complete in self.in_flight.leaving():
            del self._waiters[sequence.id]
            self._running.leave(sequence, num_complete)
