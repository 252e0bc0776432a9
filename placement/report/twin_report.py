"""What a simulation says at one rate, over several seeds: latencies, attainment, use of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..goodput.goodput import mean_interval
from ..goodput.judging import JointJudge, counted_rows
from ..simulation.run import FloatColumn, SimulatedRun
from ..workload.workload import Workload

RANKS = (50, 90, 95, 99)
COLUMNS = ("ttft", "tpot", "e2e", "queue", "prefill", "transfer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Mean and percentiles of one column, milliseconds."""

    mean_ms: float
    percentiles_ms: dict[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One worker, mean over runs."""

    name: str
    busy_share: float
    peak_block_share: float
    steps: int
    preemptions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TwinReport:
    """Requests at the start and at the end of a run do not count, but for served and failed."""

    rate_rps: float
    requests: int
    served: int
    attainment: dict[str, float]  # joint, by class
    interval: tuple[float, float]  # of the first class's attainment, 95%, over seeds
    goodput_rps: float  # requests a second that met both targets
    output_tokens_per_s: float
    preemptions: int
    spreads: dict[str, Spread]
    workers: tuple[Use, ...]


def report(
    workloads: Sequence[Workload], runs: Sequence[SimulatedRun], judge: JointJudge
) -> TwinReport:
    """Of runs of one deployment and rate, a seed each."""
    verdicts = [judge.verdict(w, run) for w, run in zip(workloads, runs, strict=True)]
    names = verdicts[0].attainments
    attainment = {
        name: float(np.mean([verdict.attainments.get(name, 1.0) for verdict in verdicts]))
        for name in names
    }
    first = next(iter(names))
    mean, half = mean_interval([verdict.attainments[first] for verdict in verdicts])
    rate_rps = float(np.mean([workload.rate_rps for workload in workloads]))
    met = float(
        np.mean([_met_share(w, run, judge) for w, run in zip(workloads, runs, strict=True)])
    )
    return TwinReport(
        rate_rps=rate_rps,
        requests=sum(workload.num_requests for workload in workloads),
        served=sum(run.num_served for run in runs),
        attainment=attainment,
        interval=(max(0.0, mean - half), min(1.0, mean + half)),
        goodput_rps=rate_rps * met,
        output_tokens_per_s=float(
            np.mean([_tokens_per_s(w, run) for w, run in zip(workloads, runs, strict=True)])
        ),
        preemptions=sum(int(run.preemptions.sum()) for run in runs),
        spreads={name: _spread(workloads, runs, f"{name}_s") for name in COLUMNS},
        workers=tuple(
            Use(
                name=worker.name,
                busy_share=float(np.mean([run.workers[i].busy_s / run.duration_s for run in runs])),
                peak_block_share=max(run.workers[i].peak_blocks for run in runs)
                / max(1, worker.num_blocks),
                steps=sum(run.workers[i].steps for run in runs),
                preemptions=sum(run.workers[i].preemptions for run in runs),
            )
            for i, worker in enumerate(runs[0].workers)
        ),
    )


def _met_share(workload: Workload, run: SimulatedRun, judge: JointJudge) -> float:
    ttft_s, tpot_s = judge.limits(workload)
    first, last = counted_rows(workload)
    met = (run.ttft_s <= ttft_s) & (run.tpot_s <= tpot_s)
    return float(np.mean(met[first:last]))


def _tokens_per_s(workload: Workload, run: SimulatedRun) -> float:
    served = ~np.isnan(run.e2e_s)
    return float(workload.output_tokens[served].sum() / run.duration_s) if run.duration_s else 0.0


def _spread(workloads: Sequence[Workload], runs: Sequence[SimulatedRun], column: str) -> Spread:
    parts: list[FloatColumn] = []
    for workload, run in zip(workloads, runs, strict=True):
        first, last = counted_rows(workload)
        values: FloatColumn = getattr(run, column)[first:last]
        parts.append(values[~np.isnan(values)])
    values = np.concatenate(parts) * 1e3
    if not len(values):
        return Spread(mean_ms=float("nan"), percentiles_ms=dict.fromkeys(RANKS, float("nan")))
    found = np.percentile(values, RANKS)
    return Spread(
        mean_ms=float(values.mean()),
        percentiles_ms={rank: float(value) for rank, value in zip(RANKS, found, strict=True)},
    )
