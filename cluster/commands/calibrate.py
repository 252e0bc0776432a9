"""Measure what a running cluster spends outside steps, so that its twin spends it too.

Offers a load of its own to the cluster (single prompts, answers that decode together, requests that
come at random), then finds the overheads with which the twin of the cluster file answers it alike.
The file written is what `phasewise simulate --calibration` reads, and `latency.calibration` of a
plan file. Step times come from a profile of the same hardware; paced clusters name their own.

The cluster must be idle but for this, the machine left alone, and the profile not much older.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...configs.errors import InvalidConfig
from ...configs.load import load_cluster
from ...configs.schema import ClusterConfig
from ...engine.errors import Unavailable
from ...placement.latency.phase_latency import LatencySource
from ...placement.simulation.calibration import write_calibration
from ...placement.simulation.calibration_fit import (
    FIRST_TOKENS,
    Fitted,
    calibration_load,
    fit_overheads,
)
from ...placement.simulation.deployment import Deployment, Overheads
from ...placement.simulation.simulator import simulate
from ...placement.simulation.twin import twin_of
from ...placement.workload.slo import SloPolicy, SloTargets
from ...placement.workload.workload import Workload, WorkloadSpec
from ..cli import EXIT_OK, add_config_arguments, check_address, check_writable
from ..client import AsyncClient
from ..heap import settle_heap
from ..loadgen.report import latencies
from ..proto import phasewise_pb2 as pb
from .bench import Bench, Settings, open_bench
from .simulate import source_of
from .status import to_text

EXAMPLES = """\
  phasewise profile configs/local.yaml -o profile.json
  phasewise serve configs/local.yaml
  phasewise calibrate configs/local.yaml --address 127.0.0.1:50051 --profile profile.json \\
      -o calibration.json
  phasewise simulate configs/local.yaml --workload configs/workload-chat.yaml --rate 4 \\
      --profile profile.json --calibration calibration.json"""

ANSWER = 100  # tokens of what decodes together, at most
SHORTEST, LONGEST = 16, 2048  # tokens of single prompts
LENGTHS = 7
TIMES_ALONE = 1.5  # between single requests: what one takes by its steps, and as much again by half
LEAST_IDLE_S = 0.1
LEAST_ANSWERED = 0.95  # of the load
POOR_FIT = 0.15  # median error from which the machine is suspected
CONNECT_S = 5.0

Column = NDArray[np.float64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", required=True, help="the gateway's gRPC")
    add("--profile", metavar="FILE", type=Path, help="step times, of `phasewise profile`")
    add("-o", "--output", metavar="CALIBRATION.json", type=Path, required=True)
    add(
        "--cores",
        metavar="N",
        type=int,
        help="that workers, gateway and clients share [all of this machine]",
    )
    add("--repeats", metavar="N", type=int, default=3, help="of the load; medians count [3]")
    add("--timeout-s", metavar="S", type=float, default=120.0, help="deadline of a request [120]")
    add("--json", action="store_true", help="print what was found as JSON")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One invocation, read and checked."""

    config: ClusterConfig
    source: LatencySource | None
    policy: SloPolicy
    load: Workload
    cores: int  # 0: paced steps, which take their time whatever the host does
    repeats: int
    timeout_s: float

    def twin(self, overheads: Overheads) -> Deployment:
        return twin_of(self.config, self.source, overheads=overheads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The load as clients saw it, a row a request; NaN: not answered in full."""

    ttft_s: Column
    tpot_s: Column
    serving_s: float  # core time of gateway and this process


def run(args: argparse.Namespace) -> int:
    task = read_task(args)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        answered = asyncio.run(_measure(task, args.address, bar))
        bar.add_task("fitting", total=None)
        found = fit_overheads(
            task.twin,
            task.load,
            answered.ttft_s,
            answered.tpot_s,
            cores=task.cores,
            serving_s=answered.serving_s,
        )
    origin = (
        f"measured {datetime.date.today()} on {Path(args.config).name}; its own load is predicted "
        f"{found.accuracy}"
    )
    write_calibration(found.overheads, origin, args.output)
    if args.json:
        print(json.dumps({"output": str(args.output), "origin": origin, **asdict(found)}, indent=1))
    else:
        print(_text(found, args.output))
    return EXIT_OK


def read_task(args: argparse.Namespace) -> Task:
    """Raises InvalidConfig for whatever is wrong with the files and flags."""
    for flag, value in (("--cores", args.cores), ("--repeats", args.repeats)):
        if value is not None and not 1 <= value <= 1024:
            raise InvalidConfig(flag, f"{value}", "give 1 to 1024")
    if not 0 < args.timeout_s < 86400:
        raise InvalidConfig("--timeout-s", f"{args.timeout_s:g} s", "give more than 0 seconds")
    check_writable("--output", args.output)
    check_address(args.address)
    config = load_cluster(args.config, args.overrides)
    source = source_of(config, args.profile, None)
    paced = config.decode.device == "paced"
    if paced and args.cores is not None:
        raise InvalidConfig("--cores", "paced workers compute nothing", "leave it out")
    slo = config.slo
    targets = SloTargets(
        ttft_s=slo.ttft_ms / 1e3, tpot_s=slo.tpot_ms / 1e3, attainment=slo.attainment
    )
    return Task(
        config=config,
        source=source,
        policy=SloPolicy(default=targets, classes={}),
        load=load_for(twin_of(config, source)),
        cores=0 if paced else args.cores or os.cpu_count() or 1,
        repeats=args.repeats,
        timeout_s=args.timeout_s,
    )


def load_for(twin: Deployment) -> Workload:
    """A calibration load that the cluster can hold, as slow as its steps are."""
    longest = min(LONGEST, twin.max_model_len // 2)
    answer = max(FIRST_TOKENS, min(ANSWER, twin.max_model_len // 8))
    lengths = sorted({round(n) for n in np.geomspace(SHORTEST, longest, LENGTHS)})
    if len(lengths) < LENGTHS:
        raise InvalidConfig(
            "model.max_model_len",
            f"{twin.max_model_len} tokens are too few to calibrate with",
            f"serve with {4 * SHORTEST} or more",
        )

    def alone_s(prompt: int, output: int) -> float:
        row = Workload(
            arrival_s=np.zeros(1),
            prompt_tokens=np.array([prompt], np.int32),
            output_tokens=np.array([output], np.int32),
        )
        return float(simulate(twin, row).e2e_s[0])

    slowest_s = max(alone_s(lengths[-1], FIRST_TOKENS), alone_s(lengths[LENGTHS // 2], answer))
    idle_s = max(LEAST_IDLE_S, TIMES_ALONE * slowest_s)
    return calibration_load(lengths, answer=answer, idle_s=idle_s)


async def _measure(task: Task, address: str, bar: Progress) -> Answered:
    """Raises Unavailable for a cluster that is not the file's, is not idle or loses requests."""
    settings = Settings(
        spec=WorkloadSpec(rate_rps=1.0), policy=task.policy, timeout_s=task.timeout_s
    )
    async with AsyncClient(address) as client:
        try:
            bench = await open_bench(client, settings)
            status = await asyncio.wait_for(client.status(), CONNECT_S)
        except TimeoutError:
            raise Unavailable(f"{address} does not answer") from None
        check_cluster(task.config, status)
        settle_heap()
        warming = bar.add_task("warming up", total=LENGTHS)
        for row in range(LENGTHS):
            await bench.offer(task.load.take(np.array([row])))
            bar.advance(warming)
        runs = [
            await _offered(bench, client, task.load, bar, f"load {i + 1} of {task.repeats}")
            for i in range(task.repeats)
        ]
    return Answered(
        ttft_s=np.median([run.ttft_s for run in runs], axis=0),
        tpot_s=np.median([run.tpot_s for run in runs], axis=0),
        serving_s=float(np.median([run.serving_s for run in runs])),
    )


async def _offered(
    bench: Bench, client: AsyncClient, load: Workload, bar: Progress, title: str
) -> Answered:
    job: TaskID = bar.add_task(title, total=load.num_requests)
    before = (await client.status()).gateway.cpu_s
    run = await bench.offer(load, _advancing(bar, job))
    gateway_s = (await client.status()).gateway.cpu_s - before
    await bench.wait_idle()
    answered = sum(not sample.error for sample in run.samples) / len(run.samples)
    if answered < LEAST_ANSWERED:
        kinds = Counter(sample.error for sample in run.samples if sample.error)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise Unavailable(f"{answered:.0%} of the load were answered in full: {told}")
    ttft_s, tpot_s = latencies(run.samples)
    return Answered(ttft_s=ttft_s, tpot_s=tpot_s, serving_s=gateway_s + run.cpu_s)


def _advancing(bar: Progress, job: TaskID) -> Callable[[object], bool]:
    def advance(_: object) -> bool:
        bar.advance(job)
        return True

    return advance


def check_cluster(config: ClusterConfig, status: pb.ClusterStatus) -> None:
    """Raises Unavailable where what runs is not what the file says, or is at work."""
    asked = {"prefill": config.prefill.replicas, "decode": config.decode.replicas}
    ready = Counter(worker.role for worker in status.workers if worker.state == "ready")
    if any(ready[role] != count for role, count in asked.items()):
        raise Unavailable(
            f"the file has {asked['prefill']} prefill and {asked['decode']} decode workers, and "
            f"{ready['prefill']} and {ready['decode']} are ready: name the file that is served"
        )
    if status.gateway.in_flight:
        raise Unavailable(
            f"{status.gateway.in_flight} requests are in flight: calibrate a cluster that serves "
            "nobody else"
        )


def _text(found: Fitted, output: Path) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("overhead")
    table.add_column("", justify="right")
    for name, value in asdict(found.overheads).items():
        if name.endswith("_s"):
            table.add_row(name.removesuffix("_s"), f"{value * 1e3:.3f} ms")
        elif name != "cores":
            table.add_row(name.removesuffix("_share") + " share", f"{value:.1%}")
    words = f"{output}: the calibration's own load is predicted {found.accuracy}"
    if max(found.ttft_error, found.tpot_error) > POOR_FIT:
        words += (
            "\nwarning: that is poor. Was the machine left alone, is the profile of this hardware, "
            "and the cluster the file's?"
        )
    return f"{to_text(table)}\n{words}"
