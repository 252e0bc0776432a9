"""What is due when. Ties go by the order of asking, so a run is the same every time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any

Action = Callable[[float, Any], None]


class Agenda:
    """A heap of actions, each called once with its time and its argument."""

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Action, Any]] = []
        self._serial = 0
        self.now_s = 0.0  # of what was done last

    @property
    def next_s(self) -> float:
        return self._items[0][0] if self._items else inf

    def at(self, when_s: float, action: Action, argument: Any = None) -> None:
        self._serial += 1
        heappush(self._items, (when_s, self._serial, action, argument))

    def step(self) -> None:
        """Do what is due next."""
        self.now_s, _, action, argument = heappop(self._items)
        action(self.now_s, argument)

    def run_before(self, limit_s: float) -> None:
        """Do all that is due before `limit_s`."""
        items = self._items
        while items and items[0][0] < limit_s:
            self.now_s, _, action, argument = heappop(items)
            action(self.now_s, argument)
