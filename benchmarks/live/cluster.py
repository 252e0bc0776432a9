"""A cluster file as it runs here: launched for a while, offered loads, its requests as columns."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from live.machine import cpu_time, pin_workers
from numpy.typing import NDArray
from phasewise.cluster.client import AsyncClient
from phasewise.cluster.commands.bench import Bench, Settings, open_bench
from phasewise.cluster.heap import settle_heap
from phasewise.cluster.loadgen.load import Run
from phasewise.cluster.loadgen.report import latencies
from phasewise.placement.workload.slo import SloPolicy
from phasewise.placement.workload.workload import Workload, WorkloadSpec

MAIN = "import sys; from phasewise.cluster.cli import main; sys.exit(main(sys.argv[1:]))"
WORKER = "ray::PlacedWork"  # what Ray calls its process, cut off by the kernel
READY_S, END_S, TIMEOUT_S = 90.0, 40.0, 60.0

Column = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What clients saw of one load, a row a request. NaN: not answered in full."""

    ttft_s: Column
    tpot_s: Column
    gap_s: Column  # from the first token to the second; NaN for answers of one
    late_s: float  # p99 of the sends' lateness
    client_share: float  # of a core
    others_share: float  # of a core, that processes of others took meanwhile
    serving_s: float = 0.0  # core time of gateway and generator; 0: was not measured


def served(run: Run, others_s: float, serving_s: float) -> Served:
    ttft_s, tpot_s = latencies(run.samples)
    gaps = [sample.gaps_s[0] if sample.gaps_s else np.nan for sample in run.samples]
    return Served(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        gap_s=np.array(gaps),
        late_s=float(np.percentile([sample.lateness_s for sample in run.samples], 99)),
        others_share=others_s / max(run.ended_s - run.began_s, 1e-9),
        client_share=run.cpu_s / max(run.ended_s - run.began_s, 1e-9),
        serving_s=serving_s,
    )


@contextlib.asynccontextmanager
async def running(
    config: Path, overrides: Sequence[str], policy: SloPolicy, *, prompt_seed: int, pinned: bool
) -> AsyncIterator[Bench]:
    """`phasewise serve` on ports that the system picks, warm, and the load generator's client."""
    with serving(config, overrides, pinned=pinned) as address:
        async with AsyncClient(address) as client:
            spec = WorkloadSpec(rate_rps=1.0)
            settings = Settings(
                spec=spec, policy=policy, timeout_s=TIMEOUT_S, prompt_seed=prompt_seed
            )
            bench = await open_bench(client, settings)
            settle_heap()
            yield bench


@contextlib.contextmanager
def serving(config: Path, overrides: Sequence[str], *, pinned: bool) -> Iterator[str]:
    """Its address; `pinned`: each worker on a core of its own. Ends what it started."""
    asked = [*overrides, "gateway.grpc=127.0.0.1:0", "gateway.http=null"]
    words = [word for pair in asked for word in ("--set", pair)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(config), "--json", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], READY_S)
            line = process.stdout.readline() if readable else ""
            if not line:
                errors.seek(0)
                raise SystemExit(f"{config.name} did not start:\n{errors.read()}")
            if pinned:
                pin_workers(process.pid, WORKER)
            yield json.loads(line)["grpc"]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def offered(bench: Bench, workload: Workload) -> Served:
    """Offer a load whole, and wait until the cluster is idle again."""
    before = cpu_time()
    run = await bench.offer(workload)
    after = cpu_time()
    await bench.wait_idle()
    return served(run, after.others_since(before), after.serving_s - before.serving_s)
