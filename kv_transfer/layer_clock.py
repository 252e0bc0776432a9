"""How far a model step has come, told by the compute thread to whoever sends its KV."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any


class LayerClock:
    """One model step's progress: layers finish in order, `finish(layer)` after each.

    Written by the compute thread only, read by any. `watch` rings an event at every change, so
    that a sender sleeps instead of polling. `fail` says that no further layer will come.
    """

    __slots__ = ("_bells", "_mark", "_marks", "done", "failed", "finished_s", "step")

    def __init__(self, step: int = 0, mark: Callable[[], Any] | None = None) -> None:
        """`mark`, on a device that runs behind its host, makes an event of what was put on its
        stream so far: there `finish` means that a layer's work was given out."""
        self.step = step  # its number, by which the ranks of a worker speak of it
        self.done = 0  # layers whose KV is in the pool
        self.failed = False
        self.finished_s = 0.0  # time.monotonic() at the latest finish
        self._bells: list[Event] = []
        self._mark = mark
        self._marks: list[Any] = []

    def finish(self, layer: int) -> None:
        """The KV of `layer` and of all before it is in the pool."""
        assert layer + 1 >= self.done, "layers finish in order"
        if self._mark is not None:
            self._marks += [self._mark()] * (layer + 1 - len(self._marks))
        self.finished_s = time.monotonic()
        self.done = layer + 1
        self._ring()

    def mark_of(self, layer: int) -> Any | None:
        """The event to wait for before a finished layer's KV is read; None: it stands there."""
        return self._marks[layer] if self._marks else None

    def fail(self) -> None:
        """The step broke: leases that wait for it end as aborted."""
        self.failed = True
        self._ring()

    def watch(self, bell: Event) -> None:
        """Ring `bell` at every change from now on."""
        if bell not in self._bells:
            self._bells.append(bell)

    def _ring(self) -> None:
        for bell in self._bells:
            bell.set()


def finished_clock(num_layers: int) -> LayerClock:
    """The clock of a step that is over: KV that stands complete in the pool."""
    clock = LayerClock(step=-1)  # before all steps: complete on every rank
    clock.finish(num_layers - 1)
    return clock
