"""Two workers on this machine, three ways: 1 prefill + 1 decode, 2 colocated, and `generate`.

Each cluster is `phasewise serve` in a process of its own, launched by Ray; the load comes from
`phasewise bench`'s generator in this one. Latencies are those at the given rate, throughput is
that of all requests at once. The floor is transformers' `generate`, on one thread or all cores,
whichever is faster here, one request after the other in order of arrival. Every figure is the
median over the runs.

    python benchmarks/serve.py [--json] [--rate 4] [--requests 60] [--runs 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from live.cluster import serving
from phasewise.cluster.client import AsyncClient
from phasewise.cluster.commands.bench import Bench, Settings, open_bench
from phasewise.cluster.commands.status import to_text
from phasewise.cluster.loadgen.load import Run, Sample
from phasewise.cluster.loadgen.report import Report, report_of
from phasewise.cluster.loadgen.requests import prompt_of
from phasewise.placement.workload.slo import SloPolicy, SloTargets
from phasewise.placement.workload.workload import Workload
from phasewise.placement.workload.workload_file import read_workload
from rich.table import Table

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models" / "tiny"
CLUSTERS = {"1P1D": "local.yaml", "2 colocated": "colocated.yaml"}
FLOOR = "generate"
TIMEOUT_S = 120.0
POLICY = SloPolicy(default=SloTargets(ttft_s=0.25, tpot_s=0.05), classes={})


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One system's medians. Latencies in milliseconds."""

    system: str
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    attainment: float
    failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=60, help="in a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--workload", type=Path, default=ROOT / "configs" / "workload-chat.yaml", metavar="FILE"
    )
    args = parser.parse_args()
    load_before = os.getloadavg()[0]  # of others: what the figures are to be taken with
    spec, _ = read_workload(args.workload, rate_rps=args.rate)
    settings = Settings(
        spec=replace(spec, max_total_tokens=2048), policy=POLICY, num_requests=args.requests
    )
    rows = [
        row_of(name, asyncio.run(cluster_runs(ROOT / "configs" / config, settings, args.runs)))
        for name, config in CLUSTERS.items()
    ]
    rows.append(row_of(FLOOR, floor_runs(settings, args.runs)))
    if args.json:
        found = {
            "workload": args.workload.name,
            "rate_rps": args.rate,
            "requests": args.requests,
            "runs": args.runs,
            "load_before": load_before,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(found, indent=1))
    else:
        print(to_text(table(rows, args)))
        print(f"load average before: {load_before:.1f} on {os.cpu_count()} cores")


def row_of(system: str, runs: Sequence[tuple[Report, Report]]) -> Row:
    """Of (at the rate, all at once) reports."""

    def of(value: Any) -> float:
        return float(median(value(paced, burst) for paced, burst in runs))

    return Row(
        system=system,
        requests_per_s=of(lambda _, burst: burst.requests_per_s),
        output_tokens_per_s=of(lambda _, burst: burst.output_tokens_per_s),
        ttft_p50=of(lambda paced, _: paced.ttft_ms.p50),
        ttft_p90=of(lambda paced, _: paced.ttft_ms.p90),
        ttft_p99=of(lambda paced, _: paced.ttft_ms.p99),
        tpot_p50=of(lambda paced, _: paced.tpot_ms.p50),
        tpot_p90=of(lambda paced, _: paced.tpot_ms.p90),
        tpot_p99=of(lambda paced, _: paced.tpot_ms.p99),
        attainment=of(lambda paced, _: paced.attainment_all),
        failed=sum(sum(report.errors.values()) for pair in runs for report in pair),
    )


def at_once(workload: Workload) -> Workload:
    return replace(workload, arrival_s=np.zeros(workload.num_requests))


async def cluster_runs(config: Path, settings: Settings, runs: int) -> list[tuple[Report, Report]]:
    with serving(config, [], pinned=False) as address:
        async with AsyncClient(address) as client:
            return await measured_runs(await open_bench(client, settings), config.stem, runs)


async def measured_runs(bench: Bench, name: str, runs: int) -> list[tuple[Report, Report]]:
    await bench.warm_up()
    reports = []
    for _ in range(runs):
        workload = bench.settings.workload(None)
        paced = await bench.measure(workload, title=f"{name}, at the rate")
        burst = await bench.measure(at_once(workload), title=f"{name}, at once")
        reports.append((paced, burst))
    return reports


def floor_runs(settings: Settings, runs: int) -> list[tuple[Report, Report]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    workload = settings.workload(None)
    few = at_once(workload.head(4))

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        run = one_by_one(model, few, seed=0)
        return run.ended_s - run.began_s

    seconds(1)  # warm
    torch.set_num_threads(min((1, len(os.sched_getaffinity(0))), key=seconds))
    return [
        (
            report_of(one_by_one(model, workload, seed=run), workload, POLICY),
            report_of(one_by_one(model, at_once(workload), seed=run), at_once(workload), POLICY),
        )
        for run in range(runs)
    ]


class TokenTimes:
    """A streamer, as `generate` takes one: notes when each token comes."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        now_s = time.perf_counter()
        if not self._prompt_seen:  # the first call brings the prompt
            self._prompt_seen = True
            return
        sample = self._sample
        if sample.tokens:
            sample.gaps_s.append(now_s - sample.last_s)
        else:
            sample.first_s = now_s
        sample.last_s = now_s
        sample.tokens += 1

    def end(self) -> None:
        self._sample.ended_s = time.perf_counter()


def one_by_one(model: Any, workload: Workload, *, seed: int) -> Run:
    """Requests in order of arrival, each after the one before; late ones wait."""
    prompts = list(_prompts(model, workload, seed))
    began_s, cpu_s = time.perf_counter(), time.process_time()
    samples = []
    for prompt, after_s, count in zip(
        prompts, workload.arrival_s.tolist(), workload.output_tokens.tolist(), strict=True
    ):
        sample = Sample(intended_s=began_s + after_s)
        time.sleep(max(0.0, sample.intended_s - time.perf_counter()))
        sample.sent_s = sample.intended_s  # what follows is the system's own queue
        model.generate(
            prompt,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=TokenTimes(sample),
        )
        samples.append(sample)
    ended_s = time.perf_counter()
    used_s = time.process_time() - cpu_s
    return Run(samples=samples, began_s=began_s, ended_s=ended_s, cpu_s=used_s, stopped=False)


def _prompts(model: Any, workload: Workload, seed: int) -> Iterator[Any]:
    import torch

    vocab_size = model.config.vocab_size
    for row in range(workload.num_requests):
        yield torch.tensor([prompt_of(workload, row, vocab_size=vocab_size, seed=seed)])


def table(rows: Sequence[Row], args: argparse.Namespace) -> Table:
    page = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        title=f"{args.workload.stem}, {args.requests} requests a run, latencies at "
        f"{args.rate:g} req/s, medians of {args.runs}",
        title_justify="left",
    )
    page.add_column("")
    for name in ("req/s", "tokens/s", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "SLO"):
        page.add_column(name, justify="right")
    page.add_column("failed", justify="right")
    for row in rows:
        times = (row.ttft_p50, row.ttft_p90, row.ttft_p99, row.tpot_p50, row.tpot_p90, row.tpot_p99)
        page.add_row(
            row.system,
            f"{row.requests_per_s:.2f}",
            f"{row.output_tokens_per_s:.0f}",
            *(f"{value:.1f} ms" for value in times),
            f"{row.attainment:.0%}",
            str(row.failed),
        )
    return page


if __name__ == "__main__":
    main()
