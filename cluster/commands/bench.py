"""Offer load to a running cluster and measure what its clients see.

An open loop: requests are sent when the workload says, whatever has been answered before, and
latency counts from that moment. Prompts are random token ids of the asked lengths, answers have
exactly the asked lengths. A request attains its targets when it meets TTFT and TPOT both.

WORKLOAD is a trace (Azure, BurstGPT, Mooncake, Splitwise, Vidur, or JSON lines of one's own), a
plan file, or a YAML file with a `workload` section as plan files have it, and optionally `slo` with
targets, of classes too. Targets that neither file nor flags give are the cluster's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...configs.errors import InvalidConfig
from ...engine.errors import Unavailable
from ...placement.workload.slo import SloPolicy, SloTargets
from ...placement.workload.workload import Workload, WorkloadSpec
from ...placement.workload.workload_file import read_workload
from ..cli import EXIT_OK, EXIT_RUNTIME, check_address, without_nan
from ..client import AsyncClient
from ..heap import settle_heap
from ..loadgen.goodput import Goodput, Hopeless, Trial, find_goodput, held
from ..loadgen.load import Run, Sample, offer
from ..loadgen.report import Report, render, report_of
from ..loadgen.requests import requests_of
from .status import to_text

EXAMPLES = """\
  phasewise bench --address 127.0.0.1:50051 --workload configs/workload-chat.yaml --rate 4
  phasewise bench --address 127.0.0.1:50051 --workload trace.csv --num-requests 500 --json
  phasewise bench --address 127.0.0.1:50051 --workload configs/workload-chat.yaml \\
      --find-goodput --slo-ttft-ms 200 --slo-tpot-ms 40 --attainment 0.9"""

TARGETS = frozenset({"ttft_s", "tpot_s", "attainment"})
USUAL_REQUESTS = 4096  # made at once, so that streams of several rates are one, stretched
MOST_REQUESTS = 100_000
FEWEST_REQUESTS = 30  # of a trial for goodput
WARM_UP_TOKENS = 16
STATUS_S = 5.0
IDLE_S = 60.0  # longest wait for a cluster to finish what a trial left behind
POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--address", metavar="HOST:PORT", required=True, help="the gateway's gRPC")
    add("--workload", metavar="WORKLOAD", required=True, type=Path, help="a trace or YAML file")
    add("--rate", metavar="R", type=float, help="requests a second [the workload's own]")
    add("--find-goodput", action="store_true", help="search the highest rate that holds")
    add("--duration", metavar="S", type=float, default=30.0, help="seconds of arrivals [30]")
    add("--num-requests", metavar="N", type=int, help="how many instead of for how long")
    add("--warm-up", metavar="N", type=int, default=8, help="requests before, not counted [8]")
    add("--slo-ttft-ms", metavar="MS", type=float, help="target for the first token [the file's]")
    add("--slo-tpot-ms", metavar="MS", type=float, help="target per later token [the file's]")
    add("--attainment", metavar="SHARE", type=float, help="of requests within both [the file's]")
    add("--timeout-s", metavar="S", type=float, default=120.0, help="deadline of a request [120]")
    add("--max-time-s", metavar="S", type=float, default=600.0, help="for --find-goodput [600]")
    add("--seed", metavar="N", type=_seed, default=0, help="of arrivals and lengths [0]")
    add(
        "--prompt-seed",
        metavar="N",
        type=_seed,
        help="of prompts' token ids [new ones each time: the cluster may keep KV of earlier ones]",
    )
    add("--json", action="store_true", help="print every figure as one JSON object")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is offered, and for how long."""

    spec: WorkloadSpec
    policy: SloPolicy
    of_cluster: frozenset[str] = frozenset()  # the default targets that it has to tell
    duration_s: float = 30.0
    num_requests: int | None = None
    warm_up: int = 8
    timeout_s: float = 120.0
    max_time_s: float = 600.0
    seed: int = 0
    prompt_seed: int = 0

    def workload(self, rate_rps: float | None, *, fewest: int = 1) -> Workload:
        """One seed's requests at a rate; a shorter stream is the head of a longer one."""
        count = USUAL_REQUESTS
        while True:
            made = replace(self.spec, num_requests=count).build(self.seed, rate_rps=rate_rps)
            wanted = self.num_requests
            if wanted is None:
                wanted = max(int((made.arrival_s <= self.duration_s).sum()), fewest)
            if wanted < count or len(made.arrival_s) < count or count >= MOST_REQUESTS:
                return made.head(wanted)
            count *= 8


def run(args: argparse.Namespace) -> int:
    return asyncio.run(_bench(args))  # interrupted: what is under way is cancelled


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises InvalidConfig for what the flags or the workload's file say wrong."""
    for flag in ("rate", "duration", "num_requests", "timeout_s", "max_time_s"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            name = "--" + flag.replace("_", "-")
            raise InvalidConfig(name, f"{value:g} is not positive", "give more than 0")
    for flag, value in (("--num-requests", args.num_requests or 0), ("--warm-up", args.warm_up)):
        if not 0 <= value <= MOST_REQUESTS:
            raise InvalidConfig(flag, f"{value} requests", f"give {MOST_REQUESTS} at most")
    start_rps = 1.0 if args.find_goodput else None
    spec, file = read_workload(args.workload, rate_rps=args.rate or start_rps)
    given = _given_targets(args)
    policy = file or SloPolicy(default=SloTargets(ttft_s=0.25, tpot_s=0.1), classes={})
    return Settings(
        spec=spec,
        policy=replace(policy, default=replace(policy.default, **given)),
        of_cluster=frozenset() if file else TARGETS - given.keys(),
        duration_s=args.duration,
        num_requests=args.num_requests,
        warm_up=args.warm_up,
        timeout_s=args.timeout_s,
        max_time_s=args.max_time_s,
        seed=args.seed,
        prompt_seed=secrets.randbits(32) if args.prompt_seed is None else args.prompt_seed,
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return int(text)


def _given_targets(args: argparse.Namespace) -> dict[str, float]:
    """The flags', which go over the file's targets, or over the cluster's where it has none."""
    flags = {
        "ttft_s": args.slo_ttft_ms and args.slo_ttft_ms / 1e3,
        "tpot_s": args.slo_tpot_ms and args.slo_tpot_ms / 1e3,
        "attainment": args.attainment,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if not all(0 < value < math.inf for value in given.values()) or (args.attainment or 0) > 1:
        raise InvalidConfig(
            "--slo-ttft-ms, --slo-tpot-ms, --attainment",
            "a target is not positive, or a share above 1",
            "give milliseconds above 0 and a share such as 0.9",
        )
    return given


class Bench:
    """Loads of one client on one cluster."""

    def __init__(self, client: AsyncClient, settings: Settings, vocab_size: int) -> None:
        self.client = client
        self.settings = settings
        self._vocab_size = vocab_size
        self._loads = 0  # each has prompts of its own

    async def warm_up(self) -> None:
        """Requests one at a time: connections are open and kernels compiled after them."""
        if self.settings.warm_up:
            workload = self.settings.workload(None).head(self.settings.warm_up)
            short = np.minimum(workload.output_tokens, WARM_UP_TOKENS)
            workload = replace(workload, output_tokens=short)
            for row in range(workload.num_requests):
                one = workload.take(np.array([row]))
                await self.offer(one)

    async def measure(self, workload: Workload, *, title: str) -> Report:
        """Offer a workload whole."""
        with _progress(title, workload.num_requests) as advance:
            run = await self.offer(workload, lambda _: advance())
        return report_of(run, workload, self.settings.policy)

    async def trial(self, rate_rps: float) -> Trial:
        """Offer a rate until it has held, or cannot hold any more; then wait until all is idle."""
        settings = self.settings
        workload = settings.workload(rate_rps, fewest=FEWEST_REQUESTS)
        hopeless = Hopeless(workload, settings.policy)
        with _progress(f"{rate_rps:.2f} req/s", workload.num_requests) as advance:
            run = await self.offer(workload, lambda sample: advance() and hopeless(sample))
        report = report_of(run, workload, settings.policy)
        await self.wait_idle()
        return Trial(
            rate_rps=rate_rps,
            held=held(report, settings.policy, stopped=run.stopped),
            stopped=run.stopped,
            report=report,
        )

    async def wait_idle(self) -> None:
        """Raises Unavailable for a cluster that does not finish what it was given."""
        deadline_s = time.monotonic() + IDLE_S
        while (await self.client.status()).gateway.in_flight:
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the cluster is not idle {IDLE_S:g} s after a trial")
            await asyncio.sleep(POLL_S)

    async def offer(
        self, workload: Workload, on_end: Callable[[Sample], bool] = lambda _: True
    ) -> Run:
        """Every request as it was answered; `on_end` sees each and returns whether to go on."""
        settings = self.settings
        self._loads += 1
        requests = requests_of(
            workload,
            settings.policy,
            vocab_size=self._vocab_size,
            seed=settings.prompt_seed + 1_000_003 * self._loads,
            timeout_s=settings.timeout_s,
        )
        arrival_s = workload.arrival_s.tolist()
        return await offer(
            self.client.stream, requests, arrival_s, drain_s=settings.timeout_s, on_end=on_end
        )


async def open_bench(client: AsyncClient, settings: Settings) -> Bench:
    """Ask the cluster for its limits; requests that it would refuse are left out. Targets that
    nobody gave are its own."""
    async with asyncio.timeout(STATUS_S):
        gateway = (await client.status()).gateway
    longest = settings.spec.max_total_tokens or gateway.max_model_len
    limit = min(longest, gateway.max_model_len)
    told = {
        "ttft_s": gateway.ttft_ms / 1e3,
        "tpot_s": gateway.tpot_ms / 1e3,
        "attainment": gateway.attainment,
    }
    policy = settings.policy
    targets = replace(policy.default, **{name: told[name] for name in settings.of_cluster})
    settings = replace(
        settings,
        spec=replace(settings.spec, max_total_tokens=limit),
        policy=replace(policy, default=targets),
    )
    return Bench(client, settings, gateway.vocab_size)


async def _bench(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    check_address(args.address)
    async with AsyncClient(args.address) as client:
        try:
            bench = await open_bench(client, settings)
        except TimeoutError:
            raise Unavailable(f"{args.address} does not answer") from None
        settle_heap()
        await bench.warm_up()
        if args.find_goodput:
            return await _find(bench, args)
        workload = bench.settings.workload(args.rate)
        report = await bench.measure(workload, title=f"{workload.num_requests} requests")
    if args.json:
        print(as_json({**_asked(args, bench.settings), **dataclasses.asdict(report)}))
    else:
        print(to_text(render(report, bench.settings.policy)))
    return EXIT_OK if report.completed else EXIT_RUNTIME


async def _find(bench: Bench, args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    worst_s = args.duration + IDLE_S / 2

    def time_left() -> bool:
        return time.monotonic() - started_s + worst_s < args.max_time_s

    goodput = await find_goodput(bench.trial, start_rps=args.rate or 1.0, time_left=time_left)
    if args.json:
        print(as_json({**_asked(args, bench.settings), **dataclasses.asdict(goodput)}))
    else:
        print(_goodput_text(goodput, bench.settings.policy))
    return EXIT_OK


def _asked(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What was offered, beside what came of it."""
    return {
        "address": args.address,
        "workload": str(args.workload),
        "asked_rps": args.rate,
        "seed": settings.seed,
        "prompt_seed": settings.prompt_seed,
        "slo": dataclasses.asdict(settings.policy),
    }


def _goodput_text(goodput: Goodput, policy: SloPolicy) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "req/s",
        "held",
        "sent",
        "attainment",
        "TTFT p90",
        "TPOT p90",
        "send lateness p99",
    ):
        table.add_column(name, justify="right")
    for trial in sorted(goodput.trials, key=lambda trial: trial.rate_rps):
        report = trial.report
        table.add_row(
            f"{trial.rate_rps:.2f}",
            "yes" if trial.held else "cut off" if trial.stopped else "no",
            str(report.sent),
            f"{report.attainment_all:.1%}",
            f"{report.ttft_ms.p90:.1f} ms",
            f"{report.tpot_ms.p90:.2f} ms",
            f"{report.send_lateness_ms.p99:.2f} ms",
        )
    targets, failed_rps = policy.default, goodput.failed_rps
    words = (
        f"goodput {goodput.rate_rps:.2f} req/s: {targets.attainment:.0%} within TTFT "
        f"{targets.ttft_s * 1e3:g} ms and TPOT {targets.tpot_s * 1e3:g} ms"
        f"{', each class that has its own within those' * bool(policy.classes)}; "
    )
    none_failed = "no rate that was tried failed"
    words += none_failed if math.isinf(failed_rps) else f"{failed_rps:.2f} req/s did not hold"
    if goodput.out_of_time:
        words += "\nwarning: out of time (--max-time-s) before the two were within 5%"
    return f"{to_text(table)}\n{words}"


def as_json(document: dict[str, Any]) -> str:
    """One line a key; what has no value is null."""
    return json.dumps(without_nan(document), indent=1)


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    """A bar on a terminal's standard error; yields what advances it, which returns True."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance() -> bool:
            bar.advance(task)
            return True

        yield advance
