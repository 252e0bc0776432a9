"""A batch of decodes that goes on unchanged, advanced as one, so that a simulator can jump.

Rows are told what they missed only when they leave or somebody looks, so a jump costs the same
however many there are. Only for sequences without tokens, which nothing but their length ends.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import NamedTuple

from ..engine.blocks import BlockAllocator
from ..engine.sequence import Sequence


class _Row(NamedTuple):
    """What is known of a row since it joined. Counts are of `SteadyRows` steps."""

    joined: int
    ends: int  # with this many steps taken it has its last token
    phase: int  # it needs a block for steps of this number modulo the block size


class SteadyRows:
    """Decoding rows that take every step together.

    Between `take` and `tell` a row's own fields are those of when it joined, and the blocks it
    has grown by since are promised to it by the allocator, without names.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._block_size = allocator.block_size
        self._steps = 0
        self._rows: dict[Sequence, _Row] = {}
        self._ends: list[tuple[int, int, Sequence]] = []  # heap; who left is dropped at the top
        self._serial = 0
        self._needs = [0] * allocator.block_size  # rows by phase

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: Sequence) -> bool:
        return row in self._rows

    def join(self, row: Sequence) -> bool:
        """From now on it takes steps with the others; False if it holds more blocks than usual."""
        assert row.tokens is None, "tokens of skipped steps are not known"
        size = self._block_size
        slack = len(row.blocks) * size - row.num_computed
        if slack >= size:
            return False
        ends = self._steps + row.max_total_tokens - row.num_tokens
        phase = (self._steps + slack) % size
        self._rows[row] = _Row(self._steps, ends, phase)
        self._needs[phase] += 1
        self._serial += 1
        heappush(self._ends, (ends, self._serial, row))
        return True

    def num_steps(self) -> int:
        """Steps for which every row finds its blocks, up to the first that gives some row its
        last token."""
        most = self._next_end() - self._steps
        assert most > 0, "ended() comes before the next step"
        room = self._allocator.num_available
        if self._blocks_for(most) <= room:
            return most
        least = 0
        while least < most - 1:
            middle = (least + most) // 2
            if self._blocks_for(middle) <= room:
                least = middle
            else:
                most = middle
        return least

    def take(self, num_steps: int) -> None:
        """Take that many of the `num_steps()`."""
        promised = self._allocator.promise(self._blocks_for(num_steps))
        assert promised, "more steps than num_steps() allows"
        self._steps += num_steps

    def ended(self) -> list[Sequence]:
        """Rows that have their last token with the steps taken. Each is to `leave`."""
        done = []
        while self._next_end() == self._steps:
            done.append(heappop(self._ends)[2])
        return done

    def leave(self, row: Sequence) -> None:
        """A row that ends: it is told its steps, and gives back what it was promised."""
        self._allocator.unpromise(self._tell(row))

    def settle(self) -> None:
        """All rows are told their steps and get their blocks; none is left here."""
        if not self._rows:
            return
        for row in list(self._rows):
            lacking = self._tell(row)
            if lacking:
                self._allocator.redeem(row.blocks, lacking)
        self._ends.clear()

    def _tell(self, row: Sequence) -> int:
        """Take a row out; returns how many blocks it was promised."""
        joined, _, phase = self._rows.pop(row)
        self._needs[phase] -= 1
        steps = self._steps - joined
        row.num_tokens += steps
        row.num_computed += steps
        return max(0, self._allocator.blocks_for(row.num_computed) - len(row.blocks))

    def _next_end(self) -> int:
        """The least `ends` of the rows here; -1 without rows."""
        ends, rows = self._ends, self._rows
        while ends:
            steps, _, row = ends[0]
            known = rows.get(row)
            if known is not None and known.ends == steps:
                return steps
            heappop(ends)
        return -1

    def _blocks_for(self, num_steps: int) -> int:
        """Blocks that all rows together need for the next steps."""
        size, needs = self._block_size, self._needs
        rounds, rest = divmod(num_steps, size)
        first = self._steps % size
        end = first + rest
        count = rounds * len(self._rows) + sum(needs[first:end])
        return count if end <= size else count + sum(needs[: end - size])
