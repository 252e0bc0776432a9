"""Who may take blocks of a decode worker's pool next. Decides only.

The rules, in one place:

- **Watermark.** Whoever comes in leaves one free block for every sequence that is here
  already, so that each can grow by a block before anyone must be preempted. With nobody
  here, all may be taken.
- **Preempted first.** While a preempted sequence waits, nothing new enters and nothing is leased:
  the pool has just proved too small, and the preempted one's client is in mid-stream. As
  those that are here end sooner or later, this wait is finite.
- **Backfill with an age bound.** Those that fit pass one that waits for memory, until
  it has waited longer than `max_wait_s`; from then on it is overdue and is next.
- **A shared prefix is computed once.** A prompt whose next block is being computed for another
  one waits for that, unless it is overdue.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

from ..engine.order import AgeLine, DeadlineLine, Line, Waiter
from ..engine.prefix_cache import PrefixCache
from ..engine.sequence import Sequence

_LOOK_PAST = 8  # sequences without room that one call looks past


class Admission:
    """The sequences that hold no blocks: new prompts, KV waiting elsewhere, and preempted."""

    def __init__(self, prefix: PrefixCache, max_wait_s: float) -> None:
        self.prefix = prefix
        self.allocator = prefix.allocator
        self.max_wait_s = max_wait_s
        self.prompts = DeadlineLine()
        self.room = Line()  # their KV waits in the prefill pool
        self.preempted = Line()
        self.num_waiting = 0
        self.queued_tokens = 0  # to be computed here, of prompts and preempted
        self._new_ages = AgeLine()  # of prompts and room
        self._preempted_ages = AgeLine()

    def __len__(self) -> int:
        return self.num_waiting

    def add_prompt(
        self, waiter: Waiter, *, deadline_s: float, predicted_s: float, now_s: float
    ) -> None:
        self.num_waiting += 1
        self.queued_tokens += waiter.sequence.num_tokens
        self._new_ages.push(waiter, now_s)
        self.prompts.join(waiter, deadline_s=deadline_s, predicted_s=predicted_s, now_s=now_s)

    def add_room(self, waiter: Waiter, now_s: float) -> None:
        self.num_waiting += 1
        self._new_ages.push(waiter, now_s)
        self.room.push(waiter, waiter.rank)

    def add_preempted(self, waiter: Waiter, now_s: float) -> None:
        self.num_waiting += 1
        self.queued_tokens += waiter.sequence.num_tokens
        self._preempted_ages.push(waiter, now_s)
        self.preempted.push(waiter, waiter.rank)

    def remove(self, waiter: Waiter) -> None:
        """Take a sequence out of its line: it has its blocks, or is given up."""
        assert waiter.line is not None
        self.num_waiting -= 1
        if waiter.line is not self.room:
            self.queued_tokens -= waiter.sequence.num_tokens
        waiter.line.remove(waiter)
        AgeLine.leave(waiter)

    def may_lease(self, count: int, num_here: int, now_s: float) -> bool:
        """Whether a grant of `count` blocks may pass: not while KV waits elsewhere for room."""
        if not self.num_waiting:
            return self.has_room(count, num_here)
        if self.preempted or self.room or not self.has_room(count, num_here):
            return False
        return self._new_ages.overdue(now_s - self.max_wait_s) is None

    def has_room(self, count: int, num_here: int) -> bool:
        """Whether `count` blocks leave the watermark; `num_here` sequences hold blocks."""
        return count + num_here <= self.allocator.num_available

    def next_fetch(self, num_here: int, now_s: float) -> tuple[Waiter, list[int]] | None:
        """A sequence that leaves the room line, with the blocks leased for its KV, which come
        after those that it holds now because they are here."""
        if self.preempted or not self.room:
            return None
        overdue = self._new_ages.overdue(now_s - self.max_wait_s)
        for waiter in self._candidates(self.room, overdue):
            sequence = waiter.sequence
            num_tokens = sequence.num_tokens - 1  # the last has no KV yet
            count = self.allocator.blocks_for(num_tokens)
            found = self.allocator.lookup(self.prefix.shareable(sequence, num_tokens))
            if self.has_room(self.prefix.num_to_take(found, count), num_here):
                self.allocator.share(found)
                blocks = self.allocator.lease(count - len(found))
                assert blocks is not None, "has_room() says so"
                self.remove(waiter)
                sequence.blocks = found
                return waiter, blocks
        return None

    def next_prefill(self, num_here: int, now_s: float) -> Waiter | None:
        """A sequence that leaves its line with blocks for all its tokens, to be computed here."""
        line, ages = self.prompts, self._new_ages
        if self.preempted:
            line, ages = self.preempted, self._preempted_ages
        elif self.prompts:
            self.prompts.turn_late(now_s)
        else:
            return None
        overdue = ages.overdue(now_s - self.max_wait_s)
        for waiter in self._candidates(line, overdue):
            sequence = waiter.sequence
            if waiter is not overdue and self.prefix.who_computes(sequence) is not None:
                continue
            found = self.prefix.find(sequence)
            count = self.allocator.blocks_for(sequence.num_tokens)
            if self.has_room(self.prefix.num_to_take(found, count), num_here):
                self.remove(waiter)
                admitted = self.prefix.admit(sequence, found)
                assert admitted, "has_room() says so"
                return waiter
        return None

    def least_room(self, *, most: int, free_place: bool) -> int:
        """No waiter needs fewer blocks than this to leave; only looks at up to `most` of them.

        Without a free place in the batch only fetches can leave.
        """
        nobody = self.allocator.num_blocks + 1
        if len(self) > most:
            return 0 if free_place or self.room else nobody
        lines = (self.room, self.prompts, self.preempted) if free_place else (self.room,)
        # A fetch needs no block for its last token: the lower bound serves all three lines.
        return min((self._least(waiter.sequence) for waiter in chain(*lines)), default=nobody)

    def _least(self, sequence: Sequence) -> int:
        count = self.allocator.blocks_for(sequence.num_tokens - 1)
        if not self.prefix.is_on:
            return count
        return max(0, self.prefix.num_to_take(self.prefix.find(sequence), count))

    def check(self) -> None:
        """Assert that nobody who waits here holds blocks."""
        for line in (self.preempted, self.prompts, self.room):
            for waiter in line:
                assert waiter.line is line and not waiter.sequence.blocks
        to_compute = [waiter.sequence for waiter in (*self.prompts, *self.preempted)]
        assert self.num_waiting == len(self.preempted) + len(self.prompts) + len(self.room)
        assert all(sequence.num_computed == 0 for sequence in to_compute)
        assert sum(sequence.num_tokens for sequence in to_compute) == self.queued_tokens

    @staticmethod
    def _candidates(line: Line, overdue: Waiter | None) -> Iterator[Waiter]:
        """The line's front, or the overdue one alone; nobody when that stands in another line."""
        if overdue is None:
            return islice(line, _LOOK_PAST + 1)
        return iter((overdue,) if overdue.line is line else ())
