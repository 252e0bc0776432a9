"""Queues of sequences in the order a policy gives. Used by both schedulers."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from math import nan

from .sequence import Sequence

Key = tuple[float, ...]


class Waiter:
    """A sequence in a scheduler's hands, from its arrival to its end.

    `line` is where it stands now, None while it runs or is on its way. `serial` counts arrivals:
    smaller is older, and it is kept across preemptions.
    """

    __slots__ = ("doomed", "key", "line", "sequence", "serial", "since_s")

    def __init__(self, sequence: Sequence, serial: int, now_s: float) -> None:
        self.sequence = sequence
        self.serial = serial
        self.since_s = now_s  # of its present wait
        self.key: Key = ()
        self.line: Line | None = None
        self.doomed = False  # aborted while a step computes it

    @property
    def rank(self) -> Key:
        """Priority class first, then arrival."""
        return (self.sequence.request.priority, self.serial)


class Line:
    """Waiters by ascending key, each key once. Joining near the end and leaving at the front
    cost O(log n), anywhere else a memory move on top."""

    def __init__(self) -> None:
        self._items: list[tuple[Key, Waiter]] = []
        self._head = 0  # items before it have left

    def __len__(self) -> int:
        return len(self._items) - self._head

    def __iter__(self) -> Iterator[Waiter]:
        """In order. The line must not change meanwhile."""
        for index in range(self._head, len(self._items)):
            yield self._items[index][1]

    @property
    def first(self) -> Waiter | None:
        items, head = self._items, self._head
        return items[head][1] if head < len(items) else None

    def push(self, waiter: Waiter, key: Key) -> None:
        waiter.key = key
        waiter.line = self
        insort(self._items, (key, waiter), lo=self._head)

    def remove(self, waiter: Waiter) -> None:
        items, head = self._items, self._head
        index = bisect_left(items, (waiter.key,), lo=head)
        assert items[index][1] is waiter
        waiter.line = None
        if index > head:
            del items[index]
            return
        self._head = head + 1
        if self._head > 32 and self._head * 2 > len(items):
            del items[: self._head]
            self._head = 0


class DeadlineLine(Line):
    """Priority class first; in a class the earliest deadline first, those already late last.

    A waiter is late once now + predicted > deadline: serving it first would cost those that
    can still be on time and win nothing. Late ones stand in order of arrival. The prediction is
    made when a waiter joins, so turning late is one heap operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turning: list[tuple[float, int, Key, Waiter]] = []  # heap by latest start

    def join(self, waiter: Waiter, *, deadline_s: float, predicted_s: float, now_s: float) -> None:
        latest_start_s = deadline_s - predicted_s
        if now_s > latest_start_s:
            self._push_late(waiter)
            return
        key = (waiter.sequence.request.priority, 0, deadline_s, waiter.serial)
        self.push(waiter, key)
        heappush(self._turning, (latest_start_s, waiter.serial, key, waiter))

    def turn_late(self, now_s: float) -> None:
        """Move those that can no longer be on time behind those that can."""
        turning = self._turning
        while turning and turning[0][0] < now_s:
            _, _, key, waiter = heappop(turning)
            if waiter.line is self and waiter.key is key:
                self.remove(waiter)
                self._push_late(waiter)

    def _push_late(self, waiter: Waiter) -> None:
        request = waiter.sequence.request
        self.push(waiter, (request.priority, 1, request.arrival_s, waiter.serial))


class AgeLine:
    """Who has waited longest. One that left meanwhile is dropped when it comes first.

    It is known by its `since_s`: a waiter that stopped waiting, or started again, has another.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[float, Waiter]] = deque()

    def push(self, waiter: Waiter, now_s: float) -> None:
        waiter.since_s = now_s
        self._items.append((now_s, waiter))

    @staticmethod
    def leave(waiter: Waiter) -> None:
        waiter.since_s = nan  # equal to nothing

    def overdue(self, since_s: float) -> Waiter | None:
        """The one that has waited longest, if since before `since_s`."""
        items = self._items
        while items and items[0][0] != items[0][1].since_s:
            items.popleft()
        return items[0][1] if items and items[0][0] < since_s else None
