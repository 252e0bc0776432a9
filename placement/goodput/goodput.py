"""Goodput: the highest rate at which the wanted share of requests meets its targets.

A request counts when it meets TTFT and TPOT jointly. Each seed is one stream of requests,
stretched in time for each rate (common random numbers), and yields its own goodput; from
these come the mean and a t interval. Runs that cannot pass are stopped early, and runs that
were seen whole are judged again for other shares instead of being simulated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
from scipy.special import stdtrit

from ..simulation.run import StopRule
from ..workload.workload import Workload, WorkloadSpec
from .judging import JointJudge, Judge, RequestTimes, Verdict

SEEDS = (0, 1, 2, 3, 4)
TOLERANCE = 0.01  # of a rate
WIDEN = 1.25  # first step of a bracket
LONGEST_BRACKET = 16  # steps until a rate counts as without end, or as 0: 3e8 times the first guess
CONFIDENCE = 0.95


class Simulation(Protocol):
    """One run at the workload's own rate; may end early by `stop`, or ignore it."""

    def __call__(self, workload: Workload, stop: StopRule | None) -> RequestTimes: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Requests a second: mean over seeds, with a 95% t interval."""

    share: float  # of requests that meet both targets; NaN where percentiles are judged
    rate_rps: float
    low_rps: float
    high_rps: float
    per_seed: tuple[float, ...]
    binds: str  # "ttft" | "tpot": what most miss just above this rate; "" where all pass
    runs: int  # simulations it took


@dataclass(frozen=True, kw_only=True, slots=True)
class Attainment:
    """Joint attainment at one rate, by class, each the mean over seeds."""

    rate_rps: float
    by_class: dict[str, float]


class GoodputSearch:
    """Goodput of one system under one workload; keeps what it has simulated."""

    def __init__(
        self,
        simulation: Simulation,
        spec: WorkloadSpec,
        *,
        seeds: Sequence[int] = SEEDS,
        tolerance: float = TOLERANCE,
        on_run: Callable[[int, float, bool], None] | None = None,
    ) -> None:
        """`on_run(seed, rate, passed)` is told of every simulation."""
        self.simulation = simulation
        self.spec = spec
        self.seeds = tuple(seeds)
        self.tolerance = tolerance
        self.on_run = on_run
        self.runs = 0
        self._streams: dict[int, Workload] = {}
        self._seen: dict[tuple[int, float], tuple[Workload, RequestTimes]] = {}

    def find(self, judge: Judge, start_rps: float = 1.0) -> Goodput:
        """0 where no rate passes. The search begins at `start_rps` (M/D/1's limit is a good one).

        Each seed's bracket begins at what the one before found.
        """
        before = self.runs
        rates, failing = [], []
        guess_rps = start_rps
        for seed in self.seeds:
            rate_rps, failed = self._bisect(judge, seed, guess_rps)
            rates.append(rate_rps)
            guess_rps = rate_rps or start_rps
            failing += [failed] if failed is not None else []
        late, slow = sum(v.late for v in failing), sum(v.slow for v in failing)
        mean, half = mean_interval(rates)
        return Goodput(
            share=judge.policy.default.attainment
            if isinstance(judge, JointJudge)
            else float("nan"),
            rate_rps=mean,
            low_rps=max(0.0, mean - half),
            high_rps=mean + half,
            per_seed=tuple(rates),
            binds="" if not failing else "ttft" if late >= slow else "tpot",
            runs=self.runs - before,
        )

    def find_shares(
        self, judge: JointJudge, shares: Sequence[float], start_rps: float = 1.0
    ) -> list[Goodput]:
        """Of several shares, in their order. Searched from the highest down, each from the last."""
        found: dict[float, Goodput] = {}
        for share in sorted(shares, reverse=True):
            found[share] = self.find(judge.with_share(share), start_rps)
            start_rps = found[share].rate_rps or start_rps
        return [found[share] for share in shares]

    def curve(self, judge: JointJudge, rates: Sequence[float]) -> list[Attainment]:
        """Attainment at each rate; runs are seen whole."""
        points = []
        for rate_rps in rates:
            verdicts = []
            for seed in self.seeds:
                workload, times = self._whole(seed, rate_rps)
                verdicts.append(judge.verdict(workload, times))
            by_class = {
                name: float(np.mean([verdict.attainments[name] for verdict in verdicts]))
                for name in verdicts[0].attainments
            }
            points.append(Attainment(rate_rps=rate_rps, by_class=by_class))
        return points

    def passes(self, judge: Judge, seed: int, rate_rps: float) -> Verdict:
        """One run, judged; stopped early where it cannot pass."""
        seen = self._seen.get((seed, rate_rps))
        if seen is not None:
            return judge.verdict(*seen)
        workload = self._stream(seed).at_rate(rate_rps)
        times = self.simulation(workload, judge.stop_rule(workload))
        self.runs += 1
        verdict = judge.verdict(workload, times)
        if not getattr(times, "stopped", False):
            self._seen[seed, rate_rps] = (workload, times)
        if self.on_run is not None:
            self.on_run(seed, rate_rps, verdict.passed)
        return verdict

    def _whole(self, seed: int, rate_rps: float) -> tuple[Workload, RequestTimes]:
        seen = self._seen.get((seed, rate_rps))
        if seen is None:
            workload = self._stream(seed).at_rate(rate_rps)
            seen = self._seen[seed, rate_rps] = (workload, self.simulation(workload, None))
            self.runs += 1
        return seen

    def _stream(self, seed: int) -> Workload:
        if seed not in self._streams:
            self._streams[seed] = self.spec.build(seed)
        return self._streams[seed]

    def _bisect(self, judge: Judge, seed: int, guess_rps: float) -> tuple[float, Verdict | None]:
        """The highest passing rate within the tolerance, and the verdict just above it."""
        low_rps, high_rps, failed = self._bracket(judge, seed, guess_rps)
        while failed is not None and low_rps and high_rps > low_rps * (1 + self.tolerance):
            middle_rps = sqrt(low_rps * high_rps)
            verdict = self.passes(judge, seed, middle_rps)
            if verdict.passed:
                low_rps = middle_rps
            else:
                high_rps, failed = middle_rps, verdict
        return low_rps, failed

    def _bracket(
        self, judge: Judge, seed: int, guess_rps: float
    ) -> tuple[float, float, Verdict | None]:
        """Rates that pass and fail; steps grow, so far guesses cost little more than near ones."""
        verdict = self.passes(judge, seed, guess_rps)
        up = verdict.passed
        failed = None if up else verdict
        # Only the first seed's guess may be far off.
        factor = WIDEN if seed == self.seeds[0] else 1 + 4 * self.tolerance
        edge_rps = guess_rps
        for _ in range(LONGEST_BRACKET):
            next_rps = edge_rps * factor if up else edge_rps / factor
            verdict = self.passes(judge, seed, next_rps)
            if verdict.passed != up:
                return (edge_rps, next_rps, verdict) if up else (next_rps, edge_rps, failed)
            edge_rps, failed = next_rps, None if up else verdict
            factor = min(factor * factor, 4.0)
        return (edge_rps, edge_rps, None) if up else (0.0, edge_rps, failed)


def goodput(
    simulation: Simulation,
    spec: WorkloadSpec,
    judge: Judge,
    *,
    seeds: Sequence[int] = SEEDS,
    start_rps: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Goodput:
    """One search, for who needs one figure only."""
    return GoodputSearch(simulation, spec, seeds=seeds, tolerance=tolerance).find(judge, start_rps)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval (Student's t); 0 for one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sqrt(variance / n)
