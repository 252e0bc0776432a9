"""What a simulation tells: a row a request, a row a worker, and how full they were over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int32]
Progress = Callable[[float], None]  # called now and then with the share that is done, 0 to 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """End a simulation once so many of the requests [first_row, last_row) have surely missed.

    Targets are seconds, one a request (`ttft_s[i]`), so classes may differ. Makes hopeless
    rates cheap; an ended run says `stopped`, and its attainment is an upper bound.
    """

    ttft_s: FloatColumn
    tpot_s: FloatColumn
    first_row: int
    last_row: int
    max_misses: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerUse:
    """One worker over the whole run."""

    name: str
    role: str  # "prefill" | "decode"
    busy_s: float  # of its first stage
    steps: int
    tokens: int  # computed: prompt tokens and decoded ones
    preemptions: int
    peak_blocks: int  # active and leased, as seen at step starts
    num_blocks: int
    hit_tokens: int = 0  # found in its prefix cache by sequences that were admitted
    asked_tokens: int = 0  # of all sequences that were admitted to be computed


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A worker at one moment."""

    at_s: float
    name: str
    running: int
    waiting: int
    used_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedRun:
    """Columns in the workload's order. NaN: the request was refused, failed, or not reached."""

    ttft_s: FloatColumn  # arrival to first token
    tpot_s: FloatColumn  # (last token − first) / (tokens − 1); 0 for a single token
    e2e_s: FloatColumn  # arrival to last token
    queue_s: FloatColumn  # from arrival until its prompt's first chunk
    prefill_s: FloatColumn  # from the first chunk to the first token
    transfer_s: FloatColumn  # from the first token until decode can go on; 0 if it did not move
    preemptions: IntColumn
    failovers: IntColumn
    workers: tuple[WorkerUse, ...]
    samples: tuple[Sample, ...]
    duration_s: float  # from 0 to the last event
    stopped: bool  # by a StopRule: rows not finished are NaN

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that nobody had to compute, because a prefix cache had them."""
        return sum(worker.hit_tokens for worker in self.workers)

    @property
    def num_served(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.e2e_s)))

    def use_of(self, role: str) -> float:
        """Mean busy share of a pool's first stages; 0 for an empty pool."""
        busy = [worker.busy_s for worker in self.workers if worker.role == role]
        return sum(busy) / len(busy) / self.duration_s if busy and self.duration_s else 0.0
