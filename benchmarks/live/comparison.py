"""What a live run and its twin say of the same requests, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from live.cases import Case
from live.pieces import SEED, Folder, overheads_of, read_runs, source_of
from numpy.typing import NDArray
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.workload.slo import SloPolicy, met
from rich.table import Table

POINTS = 0.05  # of attainment
Column = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Milliseconds over all requests; TPOT over those of more than one token."""

    ttft_mean: float
    ttft_p90: float
    tpot_mean: float
    tpot_p90: float
    attainment: float


NAMES = ("ttft_mean", "ttft_p90", "tpot_mean", "tpot_p90")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rate of one case."""

    case: str
    rate_rps: float
    requests: int
    live: Figures
    twin: Figures
    tolerance: float
    others_share: float  # of a core, that others took from the live run
    client_share: float  # of a core, that the load generator used

    def error(self, name: str) -> float:
        """Of the twin, relative to live; of attainment, in shares."""
        live, twin = getattr(self.live, name), getattr(self.twin, name)
        return twin - live if name == "attainment" else twin / live - 1

    @property
    def passed(self) -> bool:
        near = all(abs(self.error(name)) <= self.tolerance for name in NAMES)
        return near and abs(self.error("attainment")) <= POINTS


def compare(case: Case, folder: Folder) -> list[Row]:
    _, policy = case.spec()
    deployment = case.twin(source_of(case, folder), overheads_of(case, folder))
    rows = []
    for rate_rps in case.rates:
        load = case.load(rate_rps, SEED)
        run = read_runs(folder.runs(case, rate_rps))
        simulated = simulate(deployment, load)
        several = load.output_tokens > 1
        rows.append(
            Row(
                case=case.name,
                rate_rps=rate_rps,
                requests=load.num_requests,
                live=figures(run.ttft_s, run.tpot_s, several, policy),
                twin=figures(simulated.ttft_s, simulated.tpot_s, several, policy),
                tolerance=case.tolerance,
                others_share=run.others_share,
                client_share=run.client_share,
            )
        )
    return rows


def figures(
    ttft_s: Column, tpot_s: Column, several: NDArray[np.bool_], policy: SloPolicy
) -> Figures:
    ttft, tpot = ttft_s * 1e3, tpot_s[several] * 1e3
    return Figures(
        ttft_mean=float(np.nanmean(ttft)),
        ttft_p90=float(np.nanpercentile(ttft, 90)),
        tpot_mean=float(np.nanmean(tpot)),
        tpot_p90=float(np.nanpercentile(tpot, 90)),
        attainment=float(np.mean(met(ttft_s, tpot_s, policy.default))),
    )


def table(rows: Sequence[Row]) -> Table:
    page = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "req/s", *NAMES, "attainment", "within", "others"):
        page.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        pairs = [
            f"{getattr(row.live, n):.1f} {getattr(row.twin, n):.1f} {row.error(n):+.0%}"
            for n in NAMES
        ]
        shares = f"{row.live.attainment:.0%} {row.twin.attainment:.0%}"
        verdict = f"{row.tolerance:.0%}: {'yes' if row.passed else 'NO'}"
        others = f"{row.others_share:.0%}"
        page.add_row(row.case, f"{row.rate_rps:g}", *pairs, shares, verdict, others)
    return page
