"""The digital twin of a cluster file: what its requests would wait, and whether they meet targets.

Drives the schedulers and routing policies that run live, with step times from a profile of the
hardware at hand (--profile, which `phasewise profile` writes) or from a hardware sheet and the
checkpoint's config.json (--hardware). Paced clusters name their own. Nothing is launched.

Targets come from the workload file where it has some, else from the cluster file. A request counts
when it meets TTFT and TPOT; the first and last twentieth of a run do not count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...configs.errors import InvalidConfig
from ...configs.load import load_cluster
from ...configs.schema import ClusterConfig
from ...placement.goodput.goodput import Goodput, GoodputSearch
from ...placement.goodput.judging import JointJudge
from ...placement.latency.extrapolation import beyond, longest_chunk, mean_decode_step
from ...placement.latency.hardware import read_hardware
from ...placement.latency.phase_latency import LatencySource
from ...placement.latency.roofline import RooflineLatency
from ...placement.latency.step_profile import read_profile
from ...placement.latency.transfer import Link
from ...placement.report.twin_report import RANKS, TwinReport, report
from ...placement.simulation.calibration import Calibration, read_calibration
from ...placement.simulation.deployment import Deployment
from ...placement.simulation.network import Network
from ...placement.simulation.simulator import simulate
from ...placement.simulation.twin import shape_of_cluster, twin_of, with_targets
from ...placement.workload.slo import SloPolicy, SloTargets
from ...placement.workload.workload import WorkloadSpec
from ...placement.workload.workload_file import read_workload
from ..cli import EXIT_OK, add_config_arguments, without_nan

EXAMPLES = """\
  phasewise simulate configs/local.yaml --workload trace.csv --profile cpu.json --rate 2
  phasewise simulate configs/gpu-1p1d.yaml --workload chat.yaml --hardware h100 --find-goodput
  phasewise simulate cluster.yaml --workload chat.yaml --hardware h100 --rate 40 --json
"""
SHARES = (0.9, 0.95, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--workload",
        required=True,
        type=Path,
        metavar="FILE",
        help="what arrives: a trace (CSV or JSON lines, .gz too), a plan file, or a YAML file with "
        "a workload section",
    )
    parser.add_argument("--rate", type=_positive, metavar="R", help="requests a second")
    parser.add_argument(
        "--requests", type=_count, metavar="N", help="requests in a run (default: the workload's)"
    )
    parser.add_argument(
        "--seeds", type=_count, default=3, metavar="N", help="runs, a seed each (default: 3)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="measured step times")
    parser.add_argument(
        "--hardware", metavar="NAME", help="a hardware sheet, as h100, or the path of one's own"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="what a live cluster spends outside steps, of `phasewise calibrate` (default: none)",
    )
    parser.add_argument(
        "--find-goodput",
        action="store_true",
        help="also search the highest rates at which 90, 95 and 99%% meet the targets",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One invocation, read and checked."""

    deployment: Deployment
    spec: WorkloadSpec
    judge: JointJudge
    seeds: tuple[int, ...]
    origin: str  # of the step times


def run(args: argparse.Namespace) -> int:
    task = read_task(args)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=args.json or not console.is_terminal,
    ) as bar:
        found = report_of(task, bar)
        goodputs = goodputs_of(task, bar) if args.find_goodput else []
    if args.json:
        print(json.dumps(without_nan(as_json(task, found, goodputs)), indent=2))
    else:
        print_report(Console(), task, found, goodputs)
    return EXIT_OK


def read_task(args: argparse.Namespace) -> Task:
    """Raises InvalidConfig for whatever is wrong with the files."""
    config = load_cluster(args.config, args.overrides)
    spec, policy = read_workload(args.workload, rate_rps=args.rate)
    calibration = read_calibration(args.calibration) if args.calibration else None
    deployment = twin_of(
        config,
        source_of(config, args.profile, args.hardware),
        network=_network(args, calibration),
        overheads=calibration.overheads if calibration else None,
    )
    room = deployment.max_model_len
    spec = replace(
        spec,
        max_total_tokens=min(spec.max_total_tokens or room, room),
        num_requests=args.requests or spec.num_requests,
    )
    if policy is None:
        slo = config.slo
        targets = SloTargets(
            ttft_s=slo.ttft_ms / 1e3, tpot_s=slo.tpot_ms / 1e3, attainment=slo.attainment
        )
        policy = SloPolicy(default=targets, classes={})
    else:
        deployment = with_targets(deployment, policy)
    return Task(
        deployment=deployment,
        spec=spec,
        judge=JointJudge(policy=policy),
        seeds=tuple(range(args.seeds)),
        origin=deployment.decode[0].latency.origin,
    )


def report_of(task: Task, bar: Progress) -> TwinReport:
    """Every seed at the given rate, seen whole."""
    job = bar.add_task("simulating", total=len(task.seeds))
    workloads, runs = [], []
    for seed in task.seeds:
        workload = task.spec.build(seed)
        step = _advance(bar, job, seed)
        workloads.append(workload)
        runs.append(simulate(task.deployment, workload, progress=step))
    return report(workloads, runs, task.judge)


def goodputs_of(task: Task, bar: Progress) -> list[Goodput]:
    job = bar.add_task("searching goodput", total=None)
    search = GoodputSearch(
        lambda workload, stop: simulate(task.deployment, workload, stop=stop),
        task.spec,
        seeds=task.seeds,
        on_run=lambda seed, rate, passed: bar.update(
            job,
            description=f"seed {seed}: {rate:.3g} req/s {'passes' if passed else 'fails'}",
        ),
    )
    start_rps = task.spec.build(task.seeds[0]).rate_rps
    return search.find_shares(task.judge, SHARES, start_rps)


def extrapolated(task: Task, found: TwinReport) -> list[str]:
    """In words, where steps lie beyond what step times were measured at."""
    deployment, workload = task.deployment, task.spec.build(task.seeds[0])
    step = mean_decode_step(
        workload,
        rate_rps=found.rate_rps,
        tpot_s=found.spreads["tpot"].mean_ms / 1e3,
        workers=len(deployment.decode),
    )
    words = []
    for worker in (*deployment.prefill, *deployment.decode):
        words += beyond(worker.latency, longest_chunk(workload, worker.max_batch_tokens), step)
    return list(dict.fromkeys(words))


def as_json(task: Task, found: TwinReport, goodputs: list[Goodput]) -> dict[str, Any]:
    left_out = {"left_out_share": task.spec.left_out_share}
    return {
        **asdict(found),
        **left_out,
        "origin": task.origin,
        "extrapolated": extrapolated(task, found),
        "goodput": [asdict(g) for g in goodputs],
    }


def print_report(console: Console, task: Task, found: TwinReport, goodputs: list[Goodput]) -> None:
    console.print(
        f"{found.requests} requests in {len(task.seeds)} runs at {found.rate_rps:.3g} req/s; "
        f"{found.served} served, {found.preemptions} preemptions"
    )
    if left_out := task.spec.left_out_share:
        console.print(
            f"{left_out:.1%} of the workload's requests are longer than "
            f"{task.spec.max_total_tokens} tokens, prompt and answer together, and left out"
        )
    console.print(f"step times: {task.origin}", style="dim")
    for words in extrapolated(task, found):
        console.print(words)
    latencies = Table("", "mean", *[f"p{rank}" for rank in RANKS], title="milliseconds")
    for name, spread in found.spreads.items():
        values = [spread.mean_ms, *spread.percentiles_ms.values()]
        latencies.add_row(name, *[f"{value:.1f}" for value in values])
    console.print(latencies)
    low, high = found.interval
    for name, share in found.attainment.items():
        target = task.judge.policy.of(name)
        console.print(
            f"{name}: {share:.1%} meet TTFT {target.ttft_s * 1e3:g} ms and TPOT "
            f"{target.tpot_s * 1e3:g} ms; wanted {target.attainment:.0%}"
        )
    of_class = f" of {next(iter(found.attainment))}" if len(found.attainment) > 1 else ""
    console.print(
        f"interval{of_class} {low:.1%} to {high:.1%}; {found.goodput_rps:.3g} req/s within "
        f"targets, {found.output_tokens_per_s:.0f} output tokens/s"
    )
    if task.spec.is_replayed_whole and len(task.seeds) > 1:
        console.print(
            "every run replays the whole trace alike: intervals know nothing of chance; ask for "
            "fewer --requests, or for other arrivals in a workload file"
        )
    workers = Table("worker", "busy", "KV at most", "steps", "preemptions")
    for use in found.workers:
        workers.add_row(
            use.name,
            f"{use.busy_share:.0%}",
            f"{use.peak_block_share:.0%}",
            str(use.steps),
            str(use.preemptions),
        )
    console.print(workers)
    for goodput in goodputs:
        console.print(
            f"goodput at {goodput.share:.0%}: {goodput.rate_rps:.3g} req/s "
            f"({goodput.low_rps:.3g} to {goodput.high_rps:.3g}), bound by "
            f"{goodput.binds.upper() or 'nothing'}"
        )


def source_of(
    config: ClusterConfig, measured: Path | None, hardware: str | None
) -> LatencySource | None:
    """Step times from a profile or a sheet. None where neither is given: a paced cluster names its
    own. Raises InvalidConfig for a profile of another model."""
    if "paced" in (config.prefill.device, config.decode.device):
        if measured or hardware:
            raise InvalidConfig(
                "--profile, --hardware",
                f"a paced cluster's steps take the times of {config.paced.hardware}",
                "leave them out, or set paced.hardware",
            )
        return None
    if measured is not None:
        profile = read_profile(measured)
        profile.require(model=config.model.path.name)
        return profile
    if hardware is not None:
        sheet = read_hardware(hardware, where="--hardware")
        return RooflineLatency(shape=shape_of_cluster(config), hardware=sheet)
    return None


def _network(args: argparse.Namespace, calibration: Calibration | None) -> Network | None:
    """As calibrated, else as the hardware's sheet says."""
    if calibration is not None and calibration.network is not None:
        return calibration.network
    if args.hardware is None:
        return None
    sheet = read_hardware(args.hardware, where="--hardware")
    return Network(
        local=Link(bytes_per_s=sheet.link_bandwidth),
        remote=Link(bytes_per_s=sheet.network_bandwidth),
    )


def _advance(bar: Progress, job: Any, seed: int) -> Callable[[float], None]:
    return lambda share: bar.update(job, completed=seed + share)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and below 1e9")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)
