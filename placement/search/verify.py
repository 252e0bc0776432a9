"""The joint system, simulated: what a search found, on the schedulers that run live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor, log, sqrt

import numpy as np

from ..goodput.goodput import mean_interval
from ..goodput.judging import JointJudge, Verdict, spared
from ..simulation.run import SimulatedRun, StopRule
from ..simulation.simulator import simulate
from ..workload.workload import Workload
from .algorithms import Report, Search
from .candidates import Judged, Placement
from .deployed import deployment_of
from .problem import Problem

REQUESTS = 700  # a seed, at least
REQUESTS_A_WORKER = 230  # of a decode pool: its batches must fill long before the run ends
MOST_WORKERS = 24  # that are simulated: of larger pools a part, at the same rate a worker
HOPELESS = 0.05  # so far below its share one seed's attainment ends the trial of a rate
STEP = 0.95  # from one rate that is tried to the next below
MOST_STEPS = 90  # down to a hundredth of what the recurrences find, or up to a hundred times
STREAMS = 8  # of requests, by recurrences: how much goodput differs from one to another


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A placement at the rate that the simulation confirms; where it confirms none, at rate 0 with
    the shares and times of the lowest rate that was tried."""

    judged: Judged
    attainment: float  # joint, mean over seeds, at judged.rate_rps
    attainment_half: float  # half the width of its 95% interval
    tightest: str  # of the classes, or of the limits on slowdowns ("tpot p90"), the nearest
    simulated: Placement  # what was run: one unit, or a part of one
    use_prefill: float  # busy share
    use_decode: float
    ttft_ms: tuple[float, float, float]  # p50, p90, p99
    tpot_ms: tuple[float, float, float]
    transfer_ms: float  # mean
    preemptions: int
    runs: int
    streams: tuple[float, ...] = ()  # goodput on each stream, relative to their mean
    seeds: int = 1  # that were simulated

    def half_of(self, differences: Sequence[float]) -> float:
        """Of the 95% interval of a mean over the seeds of what differs so from stream to stream:
        Student's t of the streams, the root of as many as were simulated."""
        _, half = mean_interval(differences)
        return half * sqrt(len(differences) / self.seeds)


def nothing(judged: Judged) -> Verified:
    """Of a placement that meets the targets at no rate."""
    nan = float("nan")
    return Verified(
        judged=judged,
        attainment=0.0,
        attainment_half=0.0,
        tightest="",
        simulated=judged.placement,
        use_prefill=0.0,
        use_decode=0.0,
        ttft_ms=(nan, nan, nan),
        tpot_ms=(nan, nan, nan),
        transfer_ms=0.0,
        preemptions=0,
        runs=0,
    )


class Verifier:
    """Simulates placements of one problem; all meet the same requests."""

    def __init__(self, problem: Problem, report: Report) -> None:
        self.problem, self._report = problem, report
        self._streams: list[Search] = []

    def verify(self, judged: Judged) -> Verified:
        """At the highest rate, of the found one and steps above and below it, at which all classes
        reach their shares on the mean over seeds."""
        trials = _Trials(self.problem, judged, self._report)
        step = highest_step(trials.all_hold, trials.promising_step())
        return trials.refuted() if step is None else self._confirmed(trials, step)

    def verify_above(self, judged: Judged, rate_rps: float) -> Verified | None:
        """The same; None where no more than that rate holds, which is found out sooner."""
        trials = _Trials(self.problem, judged, self._report)
        start = max(-MOST_STEPS, floor(log(judged.rate_rps / rate_rps, STEP) + 1e-9) + 1)
        if start > MOST_STEPS or not trials.all_hold(start):
            return None
        step = highest_step(trials.all_hold, start)
        assert step is not None, "it holds at the start"
        return self._confirmed(trials, step)

    def _confirmed(self, trials: _Trials, step: int) -> Verified:
        """The rate's interval: goodput differs from stream to stream as it does by recurrences,
        whose many streams cost little, and the rate is the mean of as many as were simulated."""
        judged, rate_rps = trials.judged, trials.rate_rps(step)
        found = replace(trials.verified(step), streams=self._relative(judged))
        half_rps = rate_rps * found.half_of(found.streams)
        confirmed = replace(
            judged,
            rate_rps=rate_rps,
            low_rps=max(0.0, rate_rps - half_rps),
            high_rps=rate_rps + half_rps,
            by="simulation",
        )
        self._report("simulation", 1.0)
        return replace(found, judged=confirmed)

    def _relative(self, judged: Judged) -> tuple[float, ...]:
        """Goodput by recurrences on each stream, relative to their mean."""
        while len(self._streams) < STREAMS:
            seed = len(self._streams)
            self._streams.append(Search(self.problem, seed=seed))
        rates = [s.rate_near(judged.placement, judged.rate_rps) for s in self._streams]
        mean = sum(rates) / len(rates)
        return tuple(rate / mean for rate in rates)


def highest_step(
    holds: Callable[[int], bool], start: int, most: int = MOST_STEPS, least: int = -MOST_STEPS
) -> int | None:
    """The highest step that holds, where steps up to one of them do: by doubled strides from
    `start`, then halved ones between. None where not even the least does."""
    low, high, stride = start, start, 1
    if holds(start):
        while low < most and holds(high := min(most, low + stride)):
            low, stride = high, 2 * stride
        if low == most:
            return most
    else:
        while high > least and not holds(low := max(least, high - stride)):
            high, stride = low, 2 * stride
        if high == least:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One seed at one rate."""

    verdict: Verdict
    run: SimulatedRun
    short: float  # how far the worst share is below what it must reach


class _Trials:
    """One placement, run at the found rate (step 0) and at steps of 5% below and above it."""

    def __init__(self, problem: Problem, judged: Judged, report: Report) -> None:
        self.problem, self.judged, self._report = problem, judged, report
        self.seeds = range(problem.config.search.seeds)
        self._part, share = judged.placement.part(MOST_WORKERS)
        self._scale = share / judged.placement.copies
        self._deployment = deployment_of(problem, self._part)
        requests = max(REQUESTS, REQUESTS_A_WORKER * self._part.decode.count)
        self._spec = replace(problem.workload, num_requests=requests)
        self._judge = problem.slowdown or JointJudge(policy=problem.slo)
        self._seen: dict[int, list[_Trial]] = {}  # by step, a trial a seed
        self._runs = 0

    def rate_rps(self, step: int) -> float:
        return self.judged.rate_rps * STEP**-step

    def promising_step(self) -> int:
        """Down from the found rate, the first at which one seed is not hopeless: one that is ends
        early. The least step where all are."""
        found = highest_step(lambda step: self._trial(step, 0).short <= HOPELESS, 0, most=0)
        return -MOST_STEPS if found is None else found

    def all_hold(self, step: int) -> bool:
        """Whether every class reaches its share, on the mean over all seeds."""
        below = max((s for s in self._seen if s < step), default=None)
        held = [] if below is None else self._seen[below]
        for seed in self.seeds:
            trial = self._trial(step, seed)
            if trial.short > HOPELESS or self._out_of_reach(step, held):
                return False
        return True

    def _out_of_reach(self, step: int, below: Sequence[_Trial]) -> bool:
        """Even if the seeds to come did as well as at a rate below, or met every target."""
        here = self._seen[step]
        for name in here[0].verdict.attainments:
            met = sum(trial.verdict.attainments[name] for trial in here)
            for seed in self.seeds[len(here) :]:
                met += below[seed].verdict.attainments[name] if seed < len(below) else 1.0
            if met / len(self.seeds) < self._judge.share_of(name):
                return True
        return False

    def refuted(self) -> Verified:
        """At no rate, as seen at the lowest."""
        trial = self._run(-MOST_STEPS, 0, whole=True)
        binds = "ttft" if trial.verdict.late >= trial.verdict.slow else "tpot"
        none = replace(
            self.judged, rate_rps=0.0, low_rps=0.0, high_rps=0.0, binds=binds, by="simulation"
        )
        return replace(self._verified([trial]), judged=none)

    def verified(self, step: int) -> Verified:
        """Of a step at which all seeds were run."""
        return self._verified(self._seen[step])

    def _trial(self, step: int, seed: int) -> _Trial:
        trials = self._seen.setdefault(step, [])
        if seed == len(trials):
            trials.append(self._run(step, seed))
        return trials[seed]

    def _run(self, step: int, seed: int, *, whole: bool = False) -> _Trial:
        """`whole`: to its end, hopeless or not."""
        self._report("simulation", self._runs / (self._runs + len(self.seeds)))
        workload = self._spec.build(seed, rate_rps=self.rate_rps(step) * self._scale)
        stop = None if whole else _stop_rule(self.problem, workload)
        run = simulate(self._deployment, workload, stop=stop)
        self._runs += 1
        verdict = self._judge.verdict(workload, run)
        shares = verdict.attainments.items()
        short = max(self._judge.share_of(name) - share for name, share in shares)
        return _Trial(verdict=verdict, run=run, short=short)

    def _verified(self, trials: Sequence[_Trial]) -> Verified:
        runs = [trial.run for trial in trials]
        shares = [trial.verdict.attainments for trial in trials]
        means = {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}
        tightest = min(means, key=lambda name: spared(means[name], self._judge.share_of(name)))
        _, half = mean_interval([share[tightest] for share in shares])
        times = (np.concatenate([getattr(run, f) for run in runs]) for f in ("ttft_s", "tpot_s"))
        ttft_ms, tpot_ms = (_percentiles_ms(seconds) for seconds in times)
        return Verified(
            judged=self.judged,
            attainment=means[tightest],
            attainment_half=half,
            tightest=tightest,
            simulated=self._part,
            use_prefill=float(np.mean([run.use_of("prefill") for run in runs])),
            use_decode=float(np.mean([run.use_of("decode") for run in runs])),
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            transfer_ms=float(np.nanmean([np.nanmean(run.transfer_s) for run in runs])) * 1e3,
            preemptions=sum(int(run.preemptions.sum()) for run in runs),
            runs=self._runs,
            seeds=len(trials),
        )


def _stop_rule(problem: Problem, workload: Workload) -> StopRule | None:
    """Ends a run that is hopeless; classes and slowdowns need it whole."""
    if problem.slo.classes or problem.slowdown is not None:
        return None
    share = max(0.01, problem.slo.default.attainment - HOPELESS)
    return JointJudge(policy=problem.slo).with_share(share).stop_rule(workload)


def _percentiles_ms(seconds: np.ndarray) -> tuple[float, float, float]:
    p50, p90, p99 = np.nanpercentile(seconds, (50, 90, 99)) * 1e3
    return float(p50), float(p90), float(p99)
