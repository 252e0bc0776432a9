"""The compute thread: runs a worker's model steps, one at a time, beside its event loop."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from .batch import Batch, StepOutput, Underway
from .errors import RankLost
from .layout import KVLayout
from .spec import ModelSpec

log = logging.getLogger(__name__)

# Loop and compute thread share the interpreter lock. Who wants it takes it from the other after
# this long: with Python's own 5 ms a step's next operator waits until the loop has sent its news.
# Measured on two cores, a model of 4M parameters: 6% more tokens/s at batch 64, 2% at batch 8.
SWITCH_S = 50e-6

LayerDone = Callable[[int], None]


class StepFailed(Exception):
    """The model step raised: a bug or a broken device, never a client's fault."""


class StepRunner(Protocol):
    """`runner.Runner`, or `paced.PacedRunner`, which needs no torch."""

    max_model_len: int

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def layout(self) -> KVLayout: ...

    def run(self, batch: Batch, layer_done: LayerDone | None = None) -> StepOutput: ...

    def begin(
        self,
        batch: Batch,
        layer_done: LayerDone | None = None,
        former: StepOutput | Underway | None = None,
    ) -> StepOutput | Underway: ...

    def check_ranks(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A batch in the compute thread's hands."""

    batch: Batch
    begun: Future[StepOutput | Underway]


class ComputeThread:
    """Owns the thread. Only the loop calls it; only the thread touches the runner."""

    def __init__(self, runner: StepRunner) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.runner = runner
        self.steps = 0
        self.watched = 0  # steps that began with a `layer_done`: the number of the next such
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._former: StepOutput | Underway | None = None  # the thread's own: of its latest step
        self._unfinished = 0
        self._since_s = 0.0  # when the oldest unfinished step could begin

    def start(self, batch: Batch, layer_done: LayerDone | None = None) -> Step:
        """Give out a step. One that follows another begins when that has ended; steps are
        finished in the order in which they were started."""
        if not self._unfinished:
            self._since_s = time.perf_counter()
        self._unfinished += 1
        self.watched += layer_done is not None
        return Step(batch=batch, begun=self._thread.submit(self._begin, batch, layer_done))

    def recall(self, step: Step) -> bool:
        """Take back the step that was started last; False if it has begun."""
        recalled = step.begun.cancel()
        self._unfinished -= recalled
        return recalled

    async def finish(self, step: Step) -> tuple[StepOutput, float]:
        """The step's output and how long it took in seconds, not counting what it waited for the
        step before. Raises StepFailed, and RankLost when the worker cannot go on."""
        since_s = self._since_s
        try:
            output = await asyncio.wrap_future(step.begun)
            if not isinstance(output, StepOutput):
                loop = asyncio.get_running_loop()
                output = await loop.run_in_executor(self._thread, output.output)
        except (RankLost, StepFailed):
            raise
        except Exception as error:  # whatever the model raised ends these rows, not the worker
            log.exception("a step of %d rows failed", step.batch.num_rows)
            raise StepFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self._unfinished -= 1
            self._since_s = time.perf_counter()
        self.steps += 1
        return output, self._since_s - since_s

    async def run(
        self, batch: Batch, layer_done: LayerDone | None = None
    ) -> tuple[StepOutput, float]:
        """One step from start to finish."""
        return await self.finish(self.start(batch, layer_done))

    def step_age_s(self) -> float:
        """How long the step in progress has run; 0 when idle."""
        return time.perf_counter() - self._since_s if self._unfinished else 0.0

    def close(self) -> None:
        """Wait for the step in progress and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, batch: Batch, layer_done: LayerDone | None) -> StepOutput | Underway:
        """In the thread: what a step returned is there for the one that follows it."""
        former, self._former = self._former, None  # a step that fails leaves none
        if batch.follows is None:
            former = None
        elif former is None:
            raise StepFailed("the step before it failed")
        self._former = begun = self.runner.begin(batch, layer_done, former)
        return begun
