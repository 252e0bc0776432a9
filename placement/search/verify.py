"""The joint system, simulated: what a search found, on the schedulers that run live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..goodput.goodput import mean_interval
from ..goodput.judging import JointJudge, Verdict, spared
from ..latency.transfer import Link
from ..simulation.deployment import Deployment, WorkerModel
from ..simulation.network import Network
from ..simulation.run import SimulatedRun, StopRule
from ..simulation.simulator import simulate
from ..workload.workload import Workload
from .algorithms import Search
from .candidates import Judged, Placement, Pool
from .inventory import Bundle
from .problem import Problem
from .units import bundles_of

REQUESTS = 700  # a seed, at least
REQUESTS_A_WORKER = 230  # of a decode pool: its batches must fill long before the run ends
MOST_WORKERS = 24  # that are simulated: of larger pools a part, at the same rate a worker
HOPELESS = 0.05  # so far below its share one seed's attainment ends the trial of a rate
STEP = 0.95  # to the next lower rate where one does not hold
MOST_STEPS = 90  # down to a hundredth of what the recurrences find
Report = Callable[[str, float], None]


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


def verify(problem: Problem, judged: Judged, report: Report) -> Verified:
    """The highest of the found rate and steps below it at which all classes reach their shares.

    The interval of the rate is that of the recurrences over the seeds, at the same relative
    width: they share the requests, so they share what is chance.
    """
    trials = _Trials(problem, judged, report)
    step = trials.first_step()
    while step <= MOST_STEPS:
        found = trials.all_hold(step)
        if found is not None:
            rate_rps = trials.rates_rps[step]
            low, high = _interval(problem, judged, trials.seeds)
            scaled = replace(
                judged, rate_rps=rate_rps, low_rps=rate_rps * low, high_rps=rate_rps * high
            )
            report("simulation", 1.0)
            return replace(found, judged=replace(scaled, by="simulation"))
        step += 1
    report("simulation", 1.0)
    return trials.refuted()


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


def _interval(problem: Problem, judged: Judged, seeds: Sequence[int]) -> tuple[float, float]:
    """Ends of the 95% interval of a rate, relative to it."""
    rates = [judged.rate_rps]
    for seed in seeds[1:]:
        search = Search(problem, lambda what, share: None, seed)
        rates.append(search.judge(judged.placement).rate_rps)
    mean, half = mean_interval(rates)
    return max(0.0, 1 - half / mean), 1 + half / mean


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One seed at one rate."""

    verdict: Verdict
    run: SimulatedRun
    short: float  # how far the worst share is below what it must reach


class _Trials:
    """One placement, run at the found rate and at steps below it."""

    def __init__(self, problem: Problem, judged: Judged, report: Report) -> None:
        self.problem, self.judged, self._report = problem, judged, report
        self.seeds = range(problem.config.search.seeds)
        self.rates_rps = [judged.rate_rps]
        for _ in range(MOST_STEPS):
            self.rates_rps.append(self.rates_rps[-1] * STEP)
        self._part, share = judged.placement.part(MOST_WORKERS)
        self._scale = share / judged.placement.copies
        self._deployment = deployment_of(problem, self._part)
        requests = max(REQUESTS, REQUESTS_A_WORKER * self._part.decode.count)
        self._spec = replace(problem.workload, num_requests=requests)
        self._judge = problem.slowdown or JointJudge(policy=problem.slo)
        self._first: dict[int, _Trial] = {}  # of the first seed, by step
        self._runs = 0

    def first_step(self) -> int:
        """The least step at which one seed is not hopeless: doubled steps down, then halved ones
        between. A seed that is ends early, one that is not runs in full."""
        if not self._hopeless(0):
            return 0
        low, high = 0, 1
        while self._hopeless(high):
            if high == MOST_STEPS:
                return MOST_STEPS + 1
            low, high = high, min(2 * high, MOST_STEPS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._hopeless(middle) else (low, middle)
        return high

    def _hopeless(self, step: int) -> bool:
        return self._trial(step, 0).short > HOPELESS

    def all_hold(self, step: int) -> Verified | None:
        """Over all seeds; None when a class misses its share on the mean of them."""
        trials: list[_Trial] = []
        for seed in self.seeds:
            trials.append(self._trial(step, seed))
            if trials[-1].short > HOPELESS:
                return None
        found = self._verified(trials)
        names = trials[0].verdict.attainments
        means = {name: _mean_share(trials, name) for name in names}
        if any(mean < self._judge.share_of(name) for name, mean in means.items()):
            return None
        return found

    def refuted(self) -> Verified:
        """At no rate, as seen at the lowest."""
        trial = self._run(MOST_STEPS, 0, whole=True)
        binds = "ttft" if trial.verdict.late >= trial.verdict.slow else "tpot"
        none = replace(
            self.judged, rate_rps=0.0, low_rps=0.0, high_rps=0.0, binds=binds, by="simulation"
        )
        return replace(self._verified([trial]), judged=none)

    def _trial(self, step: int, seed: int) -> _Trial:
        if seed == 0 and step in self._first:
            return self._first[step]
        trial = self._run(step, seed)
        if seed == 0:
            self._first[step] = trial
        return trial

    def _run(self, step: int, seed: int, *, whole: bool = False) -> _Trial:
        """`whole`: to its end, hopeless or not."""
        self._report("simulation", self._runs / (self._runs + len(self.seeds)))
        workload = self._spec.build(seed, rate_rps=self.rates_rps[step] * self._scale)
        stop = None if whole else _stop_rule(self.problem, workload)
        run = simulate(self._deployment, workload, stop=stop)
        self._runs += 1
        verdict = self._judge.verdict(workload, run)
        shares = verdict.attainments.items()
        short = max(self._judge.share_of(name) - share for name, share in shares)
        return _Trial(verdict=verdict, run=run, short=short)

    def _verified(self, trials: Sequence[_Trial]) -> Verified:
        runs = [trial.run for trial in trials]
        means = {name: _mean_share(trials, name) for name in trials[0].verdict.attainments}
        tightest = min(means, key=lambda name: spared(means[name], self._judge.share_of(name)))
        _, half = mean_interval([trial.verdict.attainments[tightest] for trial in trials])
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
        )


def _mean_share(trials: Sequence[_Trial], name: str) -> float:
    return float(np.mean([trial.verdict.attainments[name] for trial in trials]))


def _stop_rule(problem: Problem, workload: Workload) -> StopRule | None:
    """Ends a run that is hopeless; classes and slowdowns need it whole."""
    if problem.slo.classes or problem.slowdown is not None:
        return None
    share = max(0.01, problem.slo.default.attainment - HOPELESS)
    return JointJudge(policy=problem.slo).with_share(share).stop_rule(workload)


def _percentiles_ms(seconds: np.ndarray) -> tuple[float, float, float]:
    p50, p90, p99 = np.nanpercentile(seconds, (50, 90, 99)) * 1e3
    return float(p50), float(p90), float(p99)


def deployment_of(problem: Problem, placement: Placement) -> Deployment:
    """One unit of the placement, on the nodes it gets, spares left out."""
    one = replace(placement, copies=1, spare=0)
    bundles = bundles_of(one, problem)
    assert bundles is not None, "only what fits is simulated"
    colocated = placement.prefill is None
    targets = problem.slo.default
    search = problem.config.search
    return Deployment(
        prefill=() if one.prefill is None else _workers(problem, "prefill", one.prefill, bundles),
        decode=_workers(problem, "decode", one.decode, bundles, mixed=colocated),
        kv_bytes_per_token=problem.kv_bytes_per_token,
        num_layers=problem.model.num_layers,
        block_size=problem.config.kv.block_size,
        max_model_len=problem.max_model_len,
        network=_network(placement) if search.kv_transfer else Network(),
        local_prefill="always" if colocated else "never",
        ttft_ms=targets.ttft_s * 1e3,
        tpot_ms=targets.tpot_s * 1e3,
        overheads=problem.overheads,
    )


def _network(placement: Placement) -> Network:
    """The narrower of both machine types, where they differ."""
    networks = [pool.shape.machine.network for pool in placement.pools]
    local = min((n.local for n in networks), key=_width)
    return Network(local=local, remote=min((n.remote for n in networks), key=_width))


def _width(link: Link) -> float:
    return link.bytes_per_s


def _workers(
    problem: Problem, role: str, pool: Pool, bundles: Sequence[Bundle], *, mixed: bool = False
) -> tuple[WorkerModel, ...]:
    shape, search = pool.shape, problem.config.search
    latency = shape.prefill if role == "prefill" else shape.mixed if mixed else shape.decode
    tokens = search.max_batch_tokens if role == "prefill" else search.mixed_batch_tokens
    nodes = {bundle.worker: bundle.node for bundle in reversed(bundles)}
    return tuple(
        WorkerModel(
            name=f"{role}-{i}",
            latency=latency,
            num_blocks=shape.kv_tokens // problem.config.kv.block_size,
            max_batch_size=search.max_batch_size,
            max_batch_tokens=tokens,
            node=nodes[f"{role}-{i}"],
            num_devices=shape.gpus,
        )
        for i in range(pool.count)
    )
