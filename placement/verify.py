"""The joint system, simulated: what a search found, on the schedulers that run live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..configs.schema import DecodeConfig
from .candidates import Judged, Placement, Pool
from .deployment import Deployment, WorkerModel
from .goodput import mean_interval
from .inventory import Bundle
from .judging import JointJudge, spared
from .network import Network
from .problem import Problem
from .search import Search
from .simulated_run import StopRule
from .simulator import simulate
from .transfer import Link
from .units import bundles_of
from .workload import Workload

REQUESTS = 700  # a seed, at least
REQUESTS_A_WORKER = 230  # of a decode pool: its batches must fill long before the run ends
MOST_WORKERS = 24  # that are simulated: of larger pools a part, at the same rate a worker
HOPELESS = 0.05  # so far below its share one seed's attainment ends the trial of a rate
STEP = 0.95  # to the next lower rate where one does not hold
FAR, FAR_STEP = 7, 0.85  # and after so many: calibrated overheads are not in the recurrences
MOST_STEPS = 14
Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A placement at the rate that the simulation confirms."""

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
    seeds = range(problem.config.search.seeds)
    low, high = _interval(problem, judged, seeds)
    rate_rps = judged.rate_rps
    for step in range(MOST_STEPS):
        report("simulation", step / MOST_STEPS)
        found = _simulate(problem, judged, rate_rps, seeds, step)
        if found is not None:
            scaled = replace(
                judged, rate_rps=rate_rps, low_rps=rate_rps * low, high_rps=rate_rps * high
            )
            report("simulation", 1.0)
            return replace(found, judged=replace(scaled, by="simulation"))
        rate_rps *= STEP if step < FAR else FAR_STEP
    raise AssertionError(
        f"{judged.placement} holds {rate_rps:.2f} req/s at most, by recurrences more"
    )


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


def _simulate(
    problem: Problem, judged: Judged, rate_rps: float, seeds: Sequence[int], steps: int
) -> Verified | None:
    """At one rate, over all seeds; None when a class misses its share on the mean of them."""
    part, share = judged.placement.part(MOST_WORKERS)
    deployment = deployment_of(problem, part)
    part_rps = rate_rps / judged.placement.copies * share
    requests = max(REQUESTS, REQUESTS_A_WORKER * part.decode.count)
    spec = replace(problem.workload, num_requests=requests)
    judge = problem.slowdown or JointJudge(policy=problem.slo)
    shares: list[dict[str, float]] = []
    runs = []
    for seed in seeds:
        workload = spec.build(seed, rate_rps=part_rps)
        run = simulate(deployment, workload, stop=_stop_rule(problem, workload))
        verdict = judge.verdict(workload, run)
        shares.append(dict(verdict.attainments))
        runs.append(run)
        short = (judge.share_of(name) - share for name, share in verdict.attainments.items())
        if max(short) > HOPELESS:
            return None
    means = {name: float(np.mean([s[name] for s in shares])) for name in shares[0]}
    if any(mean < judge.share_of(name) for name, mean in means.items()):
        return None
    tightest = min(means, key=lambda name: spared(means[name], judge.share_of(name)))
    _, half = mean_interval([s[tightest] for s in shares])
    ttft, tpot = (np.concatenate([getattr(run, f) for run in runs]) for f in ("ttft_s", "tpot_s"))
    return Verified(
        judged=judged,
        attainment=means[tightest],
        attainment_half=half,
        tightest=tightest,
        simulated=part,
        use_prefill=float(np.mean([run.use_of("prefill") for run in runs])),
        use_decode=float(np.mean([run.use_of("decode") for run in runs])),
        ttft_ms=_percentiles_ms(ttft),
        tpot_ms=_percentiles_ms(tpot),
        transfer_ms=float(np.nanmean([np.nanmean(run.transfer_s) for run in runs])) * 1e3,
        preemptions=sum(int(run.preemptions.sum()) for run in runs),
        runs=steps * len(seeds) + len(seeds),
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
        local_prefill_tokens=0 if colocated else DecodeConfig().local_prefill_tokens,
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
