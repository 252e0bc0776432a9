"""Which prompts a prefill worker computes next. Decides only: no clock, tensor, socket or log.

Policy, per step of at most `max_batch_tokens` tokens:

1. Priority class first; in a class the earliest first-token deadline first, requests that are
   late already last (`engine.order.DeadlineLine`). Prompts are cut into chunks, so one that
   becomes more urgent overtakes at the next step.
2. A prompt is admitted with the blocks of all its tokens or not at all, so an admitted one can
   always finish. Those that fit pass one that waits for memory.
3. Age bound: whoever has waited longer than `max_wait_s` is overdue. The oldest overdue prompt
   gets at least a quarter of every step's tokens, and while it waits for blocks nobody
   else is admitted. So overdue prompts finish one after the other, each within
   4 * num_tokens / max_batch_tokens steps of having its blocks, whatever else arrives.
4. A prompt whose next block is being computed for one that is as urgent waits for it, unless
   overdue: a prefix that many prompts share is computed once (`engine.prefix_cache`). What is
   cached counts as computed in the predicted time, so it shifts the order by deadline as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import attrgetter

from ..engine.batch import Batch, Progress, StepOutput
from ..engine.blocks import BlockAllocator
from ..engine.load import SchedulerLoad
from ..engine.order import AgeLine, DeadlineLine, Waiter
from ..engine.prefix_cache import PrefixCache
from ..engine.sequence import Sequence
from ..engine.step_time import StepTime, features_of, prefill_s
from ..engine.step_time_online import OnlineStepTime

_OVERDUE_SHARE = 4  # one part in so many of a step's tokens is the oldest overdue prompt's
_LOOK_PAST = 8  # prompts without room that one step looks past


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillLimits:
    """What bounds a step, and what a request gets that names no target of its own."""

    max_batch_tokens: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_batch_size: int = 64  # prompts in a step
    ttft_ms: float = 0.0  # the cluster's own target; 0: none, so arrival order
    max_wait_s: float = 10.0  # the age bound
    max_in_flight: int = 1  # steps; a pipeline has one a stage


class PrefillScheduler:
    """Sequences wait, run chunk by chunk, and are parked until their KV is elsewhere.

    From `next_batch` to `advance` a step is in flight, and its sequences are in no other; every
    call may come in between. Times are seconds on the caller's clock, the one of
    `Request.arrival_s`.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        limits: PrefillLimits,
        step_time: StepTime | None = None,
    ) -> None:
        """Without `step_time` a request counts as late only once its deadline has passed."""
        assert limits.max_batch_tokens > 0 and limits.max_batch_size > 0, limits
        self._allocator = allocator
        self.prefix = PrefixCache(allocator)
        self._limits = limits
        self._step_time = step_time
        self._waiters: dict[str, Waiter] = {}  # neither finished nor parked
        self._parked: dict[str, Sequence] = {}
        self._line = DeadlineLine()  # without blocks
        self._started = DeadlineLine()  # with blocks, part of the prompt computed
        self._ages = AgeLine()
        self._in_flight: list[Batch] = []
        self._serial = 0
        self._num_running = 0
        self._queued_tokens = 0
        self._context_tokens = 0

    def fits(self, num_tokens: int) -> bool:
        """Whether a prompt of this length can ever be computed here. Ask before `add`."""
        return 0 < self._allocator.blocks_for(num_tokens) <= self._allocator.num_blocks

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Queue a prompt, nothing of which is computed."""
        assert self.fits(sequence.num_tokens), f"{sequence.id} can never fit; ask fits() first"
        assert sequence.num_computed == 0 and not sequence.blocks
        assert sequence.id not in self._waiters and sequence.id not in self._parked, sequence.id
        self._serial += 1
        waiter = Waiter(sequence, self._serial, now_s)
        self._waiters[sequence.id] = waiter
        self._queued_tokens += sequence.num_tokens
        self._ages.push(waiter, now_s)
        self._queue(waiter, now_s)

    def abort(self, sequence_id: str) -> bool:
        """Forget a sequence. Its blocks are free on return, or in `advance` if a step computes it.

        False if it is not waiting or running here: unknown, aborted before, finished, or parked
        (a parked one is given up with `release`, once no transfer reads its blocks).
        """
        waiter = self._waiters.get(sequence_id)
        if waiter is None or waiter.doomed:
            return False
        if waiter.line is None:
            waiter.doomed = True
        else:
            waiter.line.remove(waiter)
            self._forget(waiter)
        return True

    def next_batch(self, now_s: float) -> Batch | None:
        """The next step's chunks; None when nothing can run before another call brings work."""
        assert len(self._in_flight) < self._limits.max_in_flight, "advance() a step in flight first"
        self._line.turn_late(now_s)
        self._started.turn_late(now_s)
        picked = self._pick(self._ages.overdue(now_s - self._limits.max_wait_s))
        if not picked:
            return None
        sequences = []
        for waiter in picked:
            assert waiter.line is not None
            waiter.line.remove(waiter)
            sequences.append(waiter.sequence)
            if waiter.sequence.first_scheduled_s is None:
                waiter.sequence.first_scheduled_s = now_s
        starts = [sequence.num_computed for sequence in sequences]
        batch = Batch(sequences=sequences, starts=starts, counts=list(picked.values()))
        self._in_flight.append(batch)
        return batch

    def advance(self, batch: Batch, output: StepOutput, now_s: float) -> Progress:
        """Take a step's result.

        Sequences whose prompt is done stand in `Progress.sequences` with their first token
        appended, and are parked until `release`; one that this token finishes stands in
        `finished` too, and its blocks are free already. Aborted ones stand nowhere.
        """
        others = [other for other in self._in_flight if other is not batch]
        assert len(others) < len(self._in_flight), "not a step in flight"
        self._in_flight = others
        progress = Progress()
        for row, (sequence, count) in enumerate(zip(batch.sequences, batch.counts, strict=True)):
            waiter = self._waiters[sequence.id]
            before = sequence.num_computed
            sequence.num_computed += count
            self._queued_tokens -= count
            self._context_tokens += count
            if waiter.doomed:  # or the step broke: nothing of it is kept
                self._forget(waiter, before)
                continue
            self.prefix.computed(sequence, before)
            if sequence.num_computed < sequence.num_tokens:
                self._queue(waiter, now_s)
            else:
                self._finish_prompt(waiter, row, output.token_ids[row], progress)
        return progress

    def release(self, sequence_id: str) -> None:
        """Free a parked sequence's blocks: its KV is elsewhere, or nobody wants it any more."""
        self.prefix.drop(self._parked.pop(sequence_id))

    def observe(self, batch: Batch, measured_s: float) -> None:
        """What the step in flight took; a model of step times that learns is taught."""
        if isinstance(self._step_time, OnlineStepTime):
            self._step_time.observe(features_of(batch), measured_s)

    def load(self) -> SchedulerLoad:
        return SchedulerLoad(
            running=self._num_running,
            waiting=len(self._waiters) - self._num_running,
            queued_tokens=self._queued_tokens,
            context_tokens=self._context_tokens,
            preemptions=0,
            blocks=self._allocator.counts(),
            hit_tokens=self.prefix.hit_tokens,
            asked_tokens=self.prefix.asked_tokens,
        )

    def check(self) -> None:
        """Assert every law of this scheduler and its allocator. Costs O(blocks + sequences)."""
        self._allocator.check()
        live = [waiter.sequence for waiter in self._waiters.values()]
        running = [sequence for sequence in live if sequence.blocks]
        assert len(running) == self._num_running
        assert sum(s.num_uncomputed for s in live) == self._queued_tokens
        assert sum(s.num_computed for s in live) == self._context_tokens
        for sequence in running:
            assert len(sequence.blocks) == self._allocator.blocks_for(sequence.num_tokens)
        for waiter in self._waiters.values():
            line = self._started if waiter.sequence.blocks else self._line
            assert waiter.line is line or self._in_flight
        self._allocator.check_held(s.blocks for s in [*running, *self._parked.values()])
        self.prefix.check({sequence.id for sequence in running})

    def _pick(self, overdue: Waiter | None) -> dict[Waiter, int]:
        """Tokens of each prompt in the next step, the most urgent first."""
        limits = self._limits
        picked: dict[Waiter, int] = {}
        left = limits.max_batch_tokens
        blocked = False
        if overdue is not None and overdue.line is None:
            overdue = None  # a step in flight has it
        if overdue is not None:
            blocked = not self._admit(overdue)
            if not blocked:
                share = max(1, left // _OVERDUE_SHARE)
                picked[overdue] = min(share, overdue.sequence.num_uncomputed)
                left -= picked[overdue]
        passed = 0
        for waiter in self._candidates(admit=not blocked):
            if not left or len(picked) == limits.max_batch_size:
                break
            if waiter is overdue:
                continue
            if not waiter.sequence.blocks:
                if self._is_waited_for(self.prefix.who_computes(waiter.sequence), picked):
                    continue
                if passed > _LOOK_PAST or not self._admit(waiter):
                    passed += 1
                    continue
            picked[waiter] = min(left, waiter.sequence.num_uncomputed)
            left -= picked[waiter]
        if left and overdue in picked:
            picked[overdue] = min(picked[overdue] + left, overdue.sequence.num_uncomputed)
        return picked

    def _is_waited_for(self, owner: str | None, picked: dict[Waiter, int]) -> bool:
        """Whether a prefix's owner goes on in this step: a less urgent one is not waited for."""
        if owner is None:
            return False
        waiter = self._waiters[owner]
        return waiter.line is None or waiter in picked

    def _candidates(self, *, admit: bool) -> Iterator[Waiter]:
        """The most urgent first: everything started and, to admit, the front of the line."""
        if not admit:
            return iter(self._started)
        front = islice(self._line, self._limits.max_batch_size + _LOOK_PAST + 1)
        if not self._started:
            return front
        return merge(self._started, front, key=attrgetter("key"))

    def _admit(self, waiter: Waiter) -> bool:
        """Whether the sequence has its blocks, now or already."""
        sequence = waiter.sequence
        if not sequence.blocks:
            if not self.prefix.admit(sequence, self.prefix.find(sequence)):
                return False
            self._queued_tokens -= sequence.num_computed
            self._context_tokens += sequence.num_computed
            self._num_running += 1
        return True

    def _queue(self, waiter: Waiter, now_s: float) -> None:
        sequence, request = waiter.sequence, waiter.sequence.request
        ttft_s = (request.ttft_ms or self._limits.ttft_ms) / 1e3 or float("inf")
        predicted_s = 0.0
        if self._step_time is not None:
            num_ready = sequence.num_computed
            if not sequence.blocks:
                num_ready = len(self.prefix.find(sequence)) * self._allocator.block_size
            predicted_s = prefill_s(
                self._step_time,
                sequence.num_tokens - num_ready,
                num_ready,
                self._limits.max_batch_tokens,
            )
        deadline_s = request.arrival_s + ttft_s
        line = self._started if sequence.blocks else self._line
        line.join(waiter, deadline_s=deadline_s, predicted_s=predicted_s, now_s=now_s)

    def _finish_prompt(self, waiter: Waiter, row: int, token_id: int, progress: Progress) -> None:
        sequence, limits = waiter.sequence, self._limits
        self._leave(waiter)
        sequence.append(token_id)
        progress.sequences.append(sequence)
        progress.token_ids.append(token_id)
        progress.rows.append(row)
        reason = sequence.finish_reason(
            token_id, eos_token_ids=limits.eos_token_ids, max_model_len=limits.max_model_len
        )
        self._parked[sequence.id] = sequence
        if reason is not None:
            self.release(sequence.id)
            progress.finished.append((sequence, reason))

    def _leave(self, waiter: Waiter) -> None:
        """The sequence no longer counts as waiting or running."""
        sequence = waiter.sequence
        del self._waiters[sequence.id]
        self._ages.leave(waiter)
        self._queued_tokens -= sequence.num_uncomputed
        self._context_tokens -= sequence.num_computed
        if sequence.blocks:
            self._num_running -= 1

    def _forget(self, waiter: Waiter, num_complete: int | None = None) -> None:
        self._leave(waiter)
        self.prefix.drop(waiter.sequence, num_complete)
