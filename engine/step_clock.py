"""Where a worker's steps spend their time: sums over its live steps, a few clock readings each.

Every moment from asking the scheduler to having sent the step's news belongs to one part:

- schedule: the scheduler's choice, and what it fetches
- prepare: the batch as columns, in the compute thread
- model: the forward pass, up to the logits
- sample: the next tokens
- emit: the scheduler takes them, and the news go to the gateways
- switch: from the loop to the compute thread and back, and waits for the interpreter lock

Where a step is given out before the one before has come back, these are the moments from one
step's end to the next one's: what the loop does meanwhile, while the later step computes, is
summed aside. A loop that is late shows as switch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .batch import Batch, StepTimes

PARTS = ("schedule", "prepare", "model", "sample", "emit", "switch")
ASIDE = ("schedule", "emit")  # what the loop does while another step is in flight


@dataclass(kw_only=True, slots=True)
class StepSums:
    """Steps of one kind so far."""

    steps: int = 0
    following: int = 0  # of them, given out before the one before had come back
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    aside: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ASIDE, 0.0))


@dataclass(slots=True)
class _Open:
    """A step between `scheduled` and `end`."""

    begun_s: float
    scheduled_s: float
    follows: bool
    free_s: float  # when the compute thread could take it
    ran_s: float = 0.0
    times: StepTimes | None = None
    followed: bool = False  # by a step that was in flight when this one came back


class StepClock:
    """`begin`, `scheduled`, `ran`, `end`, in this order; a step that does not `end` counts nowhere.

    The next step's `begin` and `scheduled` may come before a step's `ran`, and then what the loop
    does meanwhile is on nobody's path. Decode steps, whose rows all compute one token, are summed
    apart from steps with chunks.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.decode = StepSums()
        self.chunked = StepSums()
        self._clock = clock
        self._begun_s = 0.0
        self._open: deque[_Open] = deque()  # oldest first

    def begin(self) -> None:
        """The scheduler is about to be asked."""
        self._begun_s = self._clock()

    def scheduled(self) -> None:
        """The batch is there and goes to the compute thread."""
        now_s = self._clock()
        self._open.append(_Open(self._begun_s, now_s, bool(self._open), now_s))

    def recalled(self) -> None:
        """The latest step was taken back before it began."""
        self._open.pop()

    def ran(self, times: StepTimes | None) -> None:
        """The oldest step's output is back on the loop. Without `times` all of it was the model's,
        from when the step before was back."""
        step = self._open[0]
        step.ran_s = now_s = self._clock()
        if times is None:
            start_s = step.free_s
            times = StepTimes(begun_s=start_s, prepared_s=start_s, computed_s=now_s, ended_s=now_s)
        step.times = times
        if len(self._open) > 1:
            step.followed, self._open[1].free_s = True, times.ended_s

    def end(self, batch: Batch) -> None:
        """The oldest step's news are sent."""
        step = self._open.popleft() if self._open else None
        if step is None or step.times is None:
            return
        times = step.times
        sums = self.decode if batch.num_tokens == batch.num_rows else self.chunked
        sums.steps += 1
        sums.following += step.follows
        sums.rows += batch.num_rows
        seconds, aside = sums.seconds, sums.aside
        (aside if step.follows else seconds)["schedule"] += step.scheduled_s - step.begun_s
        (aside if step.followed else seconds)["emit"] += self._clock() - step.ran_s
        seconds["prepare"] += times.prepared_s - times.begun_s
        seconds["model"] += times.computed_s - times.prepared_s
        seconds["sample"] += times.ended_s - times.computed_s
        seconds["switch"] += times.begun_s - step.free_s
        if not step.followed:
            seconds["switch"] += step.ran_s - times.ended_s
