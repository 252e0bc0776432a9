"""What a load amounted to: rates, latencies, attainment, and how honest the measurement was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...placement.workload.slo import SloPolicy, class_attainments, met
from ...placement.workload.workload import Workload
from .load import Run, Sample

RANKS = (50, 90, 95, 99)
LATE_MS = 5.0  # p99 of the sends' lateness from which the figures are the client's own
BUSY = 0.8  # share of a core from which they may be

Column = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A quantity over requests, in milliseconds. NaN where there is nothing to count."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Latencies are those of requests answered in full; attainment counts all that were sent."""

    offered_rps: float
    sent: int
    completed: int
    errors: Mapping[str, int]  # by type
    reasons: Mapping[str, str]  # what was said of the first of each type
    wall_s: float  # from the first intended send to the last answer
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread  # gaps between deliveries; tokens that came together are one
    e2e_ms: Spread
    attainment: Mapping[str, float]  # TTFT and TPOT jointly, by class
    attainment_all: float  # share of all requests that met their own class's targets
    send_lateness_ms: Spread
    client_cpu_share: float  # of one core

    @property
    def warnings(self) -> list[str]:
        """Why the figures may say more about the load generator than about the cluster."""
        found = []
        if self.send_lateness_ms.p99 > LATE_MS:
            found.append(f"sends were late: p99 {self.send_lateness_ms.p99:.1f} ms")
        if self.client_cpu_share > BUSY:
            found.append(f"the load generator used {self.client_cpu_share:.0%} of a core")
        return found


def report_of(run: Run, workload: Workload, policy: SloPolicy) -> Report:
    """`workload` is what `run` offered; requests that were not sent any more do not count."""
    samples = run.samples
    sent = workload.head(len(samples))
    good = [sample for sample in samples if not sample.error]
    tokens = sum(sample.tokens for sample in samples)
    ends = [sample.ended_s for sample in samples if sample.ended_s == sample.ended_s]
    wall_s = max(ends, default=run.ended_s) - run.began_s
    ttft_s, tpot_s = latencies(samples)
    return Report(
        offered_rps=_offered_rps(workload),
        sent=len(samples),
        completed=len(good),
        errors=dict(Counter(sample.error for sample in samples if sample.error)),
        reasons={s.error: s.reason for s in reversed(samples) if s.reason},
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        output_tokens_per_s=tokens / wall_s,
        prompt_tokens=int(sent.prompt_tokens.sum()),
        output_tokens=tokens,
        ttft_ms=_spread(sample.ttft_s for sample in good),
        tpot_ms=_spread(sample.tpot_s for sample in good if sample.tokens > 1),
        itl_ms=_spread(gap for sample in good for gap in sample.gaps_s),
        e2e_ms=_spread(sample.e2e_s for sample in good),
        attainment=class_attainments(ttft_s, tpot_s, policy, sent.class_ids, sent.class_names),
        attainment_all=_attainment_all(ttft_s, tpot_s, sent, policy),
        send_lateness_ms=_spread(sample.lateness_s for sample in samples),
        client_cpu_share=run.cpu_s / max(run.ended_s - run.began_s, 1e-9),
    )


def _offered_rps(workload: Workload) -> float:
    """NaN for requests that come all at once."""
    return workload.rate_rps if workload.arrival_s[-1] > workload.arrival_s[0] else nan


def latencies(samples: Sequence[Sample]) -> tuple[Column, Column]:
    """TTFT and TPOT a request; NaN, which meets no target, where it was not answered in full."""
    ttft_s = np.array([nan if sample.error else sample.ttft_s for sample in samples])
    tpot_s = np.array([nan if sample.error else sample.tpot_s for sample in samples])
    return ttft_s, tpot_s


def _attainment_all(ttft_s: Column, tpot_s: Column, sent: Workload, policy: SloPolicy) -> float:
    ids = np.zeros(len(ttft_s), np.int16) if sent.class_ids is None else sent.class_ids
    good = np.zeros(len(ttft_s), bool)
    for i, name in enumerate(sent.class_names):
        rows = ids == i
        good[rows] = met(ttft_s[rows], tpot_s[rows], policy.of(name))
    return float(np.mean(good))


def _spread(seconds: Iterable[float]) -> Spread:
    column = np.fromiter(seconds, np.float64) * 1e3
    column = column[np.isfinite(column)]
    if not len(column):
        return Spread(mean=nan, p50=nan, p90=nan, p95=nan, p99=nan, max=nan)
    ranks = dict(zip(("p50", "p90", "p95", "p99"), np.percentile(column, RANKS), strict=True))
    return Spread(
        mean=float(column.mean()),
        max=float(column.max()),
        **{name: float(value) for name, value in ranks.items()},
    )


def render(report: Report, policy: SloPolicy) -> RenderableType:
    """The report as a page."""
    errors = ", ".join(f"{count} {name}" for name, count in report.errors.items()) or "none"
    head = Text(
        f"{report.completed} of {report.sent} requests answered in {report.wall_s:.1f} s, "
        f"offered at {report.offered_rps:.2f} req/s; errors: {errors}\n"
        f"{report.requests_per_s:.2f} requests/s, {report.output_tokens_per_s:.1f} output tokens/s "
        f"({report.prompt_tokens} prompt and {report.output_tokens} output tokens)"
    )
    reasons = [Text(f"first {name}: {reason}") for name, reason in report.reasons.items()]
    late, share = report.send_lateness_ms, report.client_cpu_share
    tail = Text(f"load generator: sends late by p99 {late.p99:.2f} ms, {share:.0%} of a core")
    warnings = [Text(f"warning: {text}", style="bold yellow") for text in report.warnings]
    tables = _latency_table(report), _attainment_table(report, policy)
    return Group(head, *reasons, *tables, tail, *warnings)


def _latency_table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    rows = {
        "TTFT": report.ttft_ms,
        "TPOT": report.tpot_ms,
        "ITL": report.itl_ms,
        "end to end": report.e2e_ms,
    }
    for name, spread in rows.items():
        values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
        table.add_row(name, *(f"{value:.2f}" for value in values))
    return table


def _attainment_table(report: Report, policy: SloPolicy) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("class", "TTFT target", "TPOT target", "attainment", "wanted"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for name, share in report.attainment.items():
        targets = policy.of(name)
        style = "green" if share >= targets.attainment else "red"
        table.add_row(
            name,
            f"{targets.ttft_s * 1e3:g} ms",
            f"{targets.tpot_s * 1e3:g} ms",
            Text(f"{share:.1%}", style=style),
            f"{targets.attainment:.0%}",
        )
    return table
