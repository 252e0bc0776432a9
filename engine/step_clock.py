"""Where a worker's steps spend their time: sums over its live steps, a few clock readings each.

Every moment from asking the scheduler to having sent the step's news belongs to one part:

- schedule: the scheduler's choice, and what it fetches
- prepare: the batch as columns, in the compute thread
- model: the forward pass, up to the logits
- sample: the next tokens
- emit: the scheduler takes them, and the news go to the gateways
- switch: from the loop to the compute thread and back, and waits for the interpreter lock
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .batch import Batch, StepTimes

PARTS = ("schedule", "prepare", "model", "sample", "emit", "switch")


@dataclass(kw_only=True, slots=True)
class StepSums:
    """Steps of one kind so far."""

    steps: int = 0
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def overhead_s(self) -> float:
        """Seconds that were not the model's."""
        return sum(self.seconds.values()) - self.seconds["model"]


class StepClock:
    """`begin`, `scheduled`, `ran`, `end`, in this order; a step that does not `end` counts nowhere.

    Decode steps, whose rows all compute one token, are summed apart from steps with chunks.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.decode = StepSums()
        self.chunked = StepSums()
        self._clock = clock
        self._times: StepTimes | None = None
        self._begun_s = self._scheduled_s = self._ran_s = 0.0

    def begin(self) -> None:
        """The scheduler is about to be asked."""
        self._begun_s = self._clock()

    def scheduled(self) -> None:
        """The batch is there and goes to the compute thread."""
        self._times = None
        self._scheduled_s = self._clock()

    def ran(self, times: StepTimes | None) -> None:
        """The output is back on the loop. Without `times` all of it was the model's."""
        self._ran_s = self._clock()
        if times is None:
            start_s, end_s = self._scheduled_s, self._ran_s
            times = StepTimes(begun_s=start_s, prepared_s=start_s, computed_s=end_s, ended_s=end_s)
        self._times = times

    def end(self, batch: Batch) -> None:
        """The step's news are sent."""
        times = self._times
        if times is None:
            return
        self._times = None
        sums = self.decode if batch.num_tokens == batch.num_rows else self.chunked
        sums.steps += 1
        sums.rows += batch.num_rows
        seconds = sums.seconds
        seconds["schedule"] += self._scheduled_s - self._begun_s
        seconds["prepare"] += times.prepared_s - times.begun_s
        seconds["model"] += times.computed_s - times.prepared_s
        seconds["sample"] += times.ended_s - times.computed_s
        seconds["emit"] += self._clock() - self._ran_s
        seconds["switch"] += times.begun_s - self._scheduled_s + self._ran_s - times.ended_s
