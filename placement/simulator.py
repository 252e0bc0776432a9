"""The event loop: arrivals, steps, transfers and deaths, over the schedulers that run live."""

from __future__ import annotations

from collections.abc import Sequence

from .deployment import Deployment, Failure
from .simulated_run import Progress, SimulatedRun, StopRule
from .workload import Workload


def simulate(
    deployment: Deployment,
    workload: Workload,
    *,
    failures: Sequence[Failure] = (),
    stop: StopRule | None = None,
    sample_every_s: float = 0.0,
    progress: Progress | None = None,
    jump: bool = True,
) -> SimulatedRun:
    """Serve `workload` to its end. Deterministic: all chance is in the workload's seed.

    `sample_every_s` > 0 records how full workers are. `jump=False` takes every decode step for
    itself, the readable reference that jumps are tested against. Raises InvalidConfig for a
    request that fits into no worker.
    """
    ...
