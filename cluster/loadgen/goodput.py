"""Goodput of a live cluster: the highest rate whose requests meet their targets often enough.

Rates are doubled or halved until one holds and one does not, then bisected geometrically. Every
trial offers the same stream of requests, stretched in time, with other token ids, so that no
trial finds the prompts of an earlier one in a cache. A trial that cannot hold any more is cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import floor, isinf, sqrt

from ...placement.workload.slo import SloPolicy, meets_policy
from ...placement.workload.workload import Workload
from .load import Sample
from .report import Report

TOLERANCE = 1.05  # the rate that failed over the one that held, at the end
LOWEST_RPS, HIGHEST_RPS = 0.01, 20_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One rate, offered once. A trial that was cut off has figures of what was sent."""

    rate_rps: float
    held: bool
    stopped: bool
    report: Report


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """`rate_rps` held, `failed_rps` did not; 0 and infinity where no rate did."""

    rate_rps: float
    failed_rps: float
    trials: tuple[Trial, ...]
    out_of_time: bool  # the bracket could not be narrowed any more


async def find_goodput(
    run_trial: Callable[[float], Awaitable[Trial]],
    *,
    start_rps: float,
    time_left: Callable[[], bool],
) -> Goodput:
    """`time_left` is asked before every trial but the first."""
    low, high = 0.0, float("inf")
    trials: list[Trial] = []
    rate = start_rps
    while not trials or time_left():
        trial = await run_trial(rate)
        trials.append(trial)
        if trial.held:
            low = rate
        else:
            high = rate
        if low and high / low <= TOLERANCE or low >= HIGHEST_RPS or high <= LOWEST_RPS:
            break
        rate = low * 2 if isinf(high) else high / 2 if low == 0.0 else sqrt(low * high)
    narrow = low > 0 and high / low <= TOLERANCE
    return Goodput(rate_rps=low, failed_rps=high, trials=tuple(trials), out_of_time=not narrow)


def held(report: Report, policy: SloPolicy, *, stopped: bool) -> bool:
    """Whether a trial was seen to its end and every class reached its share."""
    return not stopped and meets_policy(report.attainment, policy)


class Hopeless:
    """Counts the misses of a trial; tells to go on as long as every class may reach its share."""

    def __init__(self, workload: Workload, policy: SloPolicy) -> None:
        self._policy = policy
        ids, names = workload.class_ids, workload.class_names
        sizes = Counter(names[i] for i in ids.tolist()) if ids is not None else None
        self._allowed = {
            name: floor(size * (1 - policy.of(name).attainment) + 1e-9)
            for name, size in (sizes or {names[0]: workload.num_requests}).items()
        }
        self._missed: Counter[str] = Counter()

    def __call__(self, sample: Sample) -> bool:
        name = sample.slo_class
        targets = self._policy.of(name)
        if sample.error or not (
            sample.ttft_s <= targets.ttft_s and sample.tpot_s <= targets.tpot_s
        ):
            self._missed[name] += 1
        return self._missed[name] <= self._allowed[name]
