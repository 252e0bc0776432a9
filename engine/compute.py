"""The compute thread: runs a worker's model steps, one at a time, beside its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .batch import Batch, StepOutput
from .errors import RankLost
from .layout import KVLayout
from .spec import ModelSpec

log = logging.getLogger(__name__)


class StepFailed(Exception):
    """The model step raised: a bug or a broken device, never a client's fault."""


class StepRunner(Protocol):
    """`runner.Runner`, or `paced.PacedRunner`, which needs no torch."""

    max_model_len: int

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def layout(self) -> KVLayout: ...

    def run(self, batch: Batch, layer_done: Callable[[int], None] | None = None) -> StepOutput: ...

    def check_ranks(self) -> None: ...

    def close(self) -> None: ...


class ComputeThread:
    """Owns the thread. Only the loop calls it; only the thread touches the runner."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self.steps = 0
        self.watched = 0  # steps that began with a `layer_done`: the number of the next such
        self.step_started_s: float | None = None  # a gauge for hung steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    async def run(
        self, batch: Batch, layer_done: Callable[[int], None] | None = None
    ) -> tuple[StepOutput, float]:
        """The step's output and how long it took in seconds. Raises StepFailed, and RankLost when
        the worker cannot go on."""
        loop = asyncio.get_running_loop()
        started_s = self.step_started_s = time.perf_counter()
        self.watched += layer_done is not None
        try:
            output = await loop.run_in_executor(self._thread, self.runner.run, batch, layer_done)
        except RankLost:
            raise
        except Exception as error:  # whatever the model raised ends these rows, not the worker
            log.exception("a step of %d rows failed", batch.num_rows)
            raise StepFailed(f"{type(error).__name__}: {error}") from error
        finally:
            self.step_started_s = None
        self.steps += 1
        return output, time.perf_counter() - started_s

    def step_age_s(self) -> float:
        """How long the step in progress has run; 0 when idle."""
        started_s = self.step_started_s
        return 0.0 if started_s is None else time.perf_counter() - started_s

    def close(self) -> None:
        """Wait for the step in progress and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
