"""How far a model step has come, told by the compute thread to whoever sends its KV."""

from __future__ import annotations

import time
from threading import Event


class LayerClock:
    """One model step's progress: layers finish in order, `finish(layer)` after each.

    Written by the compute thread only, read by any. `watch` rings an event at every change, so
    that a sender sleeps instead of polling. `fail` says that no further layer will come.
    """

    __slots__ = ("_bells", "done", "failed", "finished_s", "step")

    def __init__(self, step: int = 0) -> None:
        self.step = step  # its number, by which the ranks of a worker speak of it
        self.done = 0  # layers whose KV is in the pool
        self.failed = False
        self.finished_s = 0.0  # time.monotonic() at the latest finish
        self._bells: list[Event] = []

    def finish(self, layer: int) -> None:
        """The KV of `layer` and of all before it is in the pool."""
        assert layer + 1 >= self.done, "layers finish in order"
        self.finished_s = time.monotonic()
        self.done = layer + 1
        self._ring()

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
    clock = LayerClock()
    clock.finish(num_layers - 1)
    return clock
