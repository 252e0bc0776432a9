"""Goodput: the highest rate at which the wanted share of requests meets its targets.

A request counts when it meets TTFT and TPOT jointly. Each seed is one stream of requests,
stretched in time for each rate (common random numbers), and yields its own goodput; from
these come the mean and a t interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from numpy.typing import NDArray
import numpy as np

from .simulated_run import Progress, StopRule
from .slo import SloPolicy
from .workload import Workload, WorkloadSpec


class RequestTimes(Protocol):
    """What is judged: `SimulatedRun` and `MirrorTimes` both have it. Rows as in the workload."""

    @property
    def ttft_s(self) -> NDArray[np.float64]: ...
    @property
    def tpot_s(self) -> NDArray[np.float64]: ...


class Simulation(Protocol):
    """One run at the workload's own rate; may end early by `stop`, or ignore it."""

    def __call__(self, workload: Workload, stop: StopRule | None) -> RequestTimes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Requests a second, mean over seeds, with a 95% t interval."""

    share: float  # of requests that meet both targets
    rate_rps: float
    low_rps: float
    high_rps: float
    per_seed: tuple[float, ...]
    binds: str  # "ttft" | "tpot": what most of those miss that miss just above this rate
    runs: int  # simulations it took


def goodput(
    simulation: Simulation,
    spec: WorkloadSpec,
    policy: SloPolicy,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    start_rps: float = 1.0,
    tolerance: float = 0.01,
    progress: Progress | None = None,
) -> Goodput:
    """At the policy's own shares (every class its own). 0 where no rate reaches them.

    `start_rps` is where the first seed's bracket begins (M/D/1's limit is a good one); each
    later seed begins at what the one before found.
    """
    ...
