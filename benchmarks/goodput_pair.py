"""One prefill and one decode worker against two colocated ones, on the same two cores.

For three workloads: the highest rate at which 90% of requests meet TTFT and TPOT both, measured by
`phasewise bench --find-goodput`'s search on a launched cluster, beside what the twin predicts for
the same requests, with this machine's profile alone and with the calibration of
`benchmarks/twin.py` (run that first: its folder is read). The verdict is which of the two clusters
each would have chosen. What was measured is kept, as there: a search each time, and one that ended
with too wide a bracket goes on from it.

    python benchmarks/goodput_pair.py [--within-s 110] [--only-measure] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from live.cases import CONFIGS, Case, cpu_case
from live.cluster import running
from live.pieces import LAUNCH_S, PROMPTS, Folder, overheads_of, source_of, warm_up
from phasewise.cluster.commands.status import to_text
from phasewise.cluster.loadgen.goodput import Goodput as Found
from phasewise.cluster.loadgen.goodput import find_goodput
from phasewise.placement.goodput.goodput import Goodput, GoodputSearch
from phasewise.placement.goodput.judging import JointJudge
from phasewise.placement.simulation.deployment import Overheads
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.simulation.twin import with_targets
from phasewise.placement.workload.slo import SloPolicy, SloTargets
from phasewise.placement.workload.workload import WorkloadSpec
from phasewise.placement.workload.workload_file import read_workload
from rich.table import Table

FOLDER = Path(__file__).parent / "results" / "twin"
TRIAL_S = 8.0  # of arrivals
SEARCH_S = 85.0  # about seven trials: a factor of two down to 5%
WIDEST = 1.2  # a bracket that is kept: the rate that did not hold over the one that did
START_RPS = 8.0
REQUESTS = 600  # of a simulated run
CLUSTERS = ("cpu-1p1d", "cpu-colocated")
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A workload and its targets: about six times what a request takes alone here to its first
    token, four times a token alone, so that queues and company show before they ruin."""

    name: str
    ttft_ms: float
    tpot_ms: float

    @property
    def policy(self) -> SloPolicy:
        targets = SloTargets(ttft_s=self.ttft_ms / 1e3, tpot_s=self.tpot_ms / 1e3)
        return SloPolicy(default=targets, classes={})

    def spec(self, max_model_len: int) -> WorkloadSpec:
        spec, _ = read_workload(CONFIGS / f"workload-{self.name}.yaml", rate_rps=1.0)
        return replace(spec, max_total_tokens=max_model_len, num_requests=REQUESTS)


LOADS = (
    Load(name="chat", ttft_ms=150, tpot_ms=10),
    Load(name="summarise", ttft_ms=600, tpot_ms=20),
    Load(name="write", ttft_ms=100, tpot_ms=10),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Goodput of one cluster under one workload, requests a second."""

    load: str
    ttft_ms: float
    tpot_ms: float
    cluster: str
    measured_rps: float
    failed_rps: float  # the lowest rate that did not hold
    predicted_rps: float  # by the twin as calibrated
    low_rps: float
    high_rps: float
    profile_only_rps: float  # by the twin without overheads


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what was measured")
    parser.add_argument(
        "--within-s", type=float, default=1200.0, help="start nothing that ends later"
    )
    parser.add_argument(
        "--only-measure", action="store_true", help="predict nothing: that takes no idle machine"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    until_s = time.monotonic() + args.within_s
    folder = Folder(path=args.folder)
    pairs = [(load, cluster) for load in LOADS for cluster in CLUSTERS]
    for load, cluster in pairs:
        measure_once(load, cluster, folder, until_s)
    left = [pair for pair in pairs if not path_of(*pair, folder).exists()]
    if left:
        print(f"{len(left)} of {len(pairs)} are not measured yet: run this again", file=sys.stderr)
        return 1
    if args.only_measure:
        return 0
    rows = [row_of(load, cluster, folder) for load, cluster in pairs]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(to_text(table(rows)))
        print("\n".join(verdicts(rows)))
    return 0


def path_of(load: Load, cluster: str, folder: Folder) -> Path:
    return folder.path / f"goodput-{load.name}-{cluster}.json"


def case_of(load: Load, cluster: str) -> Case:
    return cpu_case(cluster, f"workload-{load.name}.yaml", (), TRIAL_S)


def measure_once(load: Load, cluster: str, folder: Folder, until_s: float) -> None:
    """Unless it was measured, or there is no time left to. A bracket that is too wide, or open on
    a side, is kept apart and begun from next time."""
    path = path_of(load, cluster, folder)
    part = path.with_suffix(".part")
    if path.exists() or time.monotonic() + LAUNCH_S + SEARCH_S > until_s:
        return
    start_rps = json.loads(part.read_text())["next_rps"] if part.exists() else START_RPS
    found = asyncio.run(measure(load, case_of(load, cluster), start_rps))
    low, high = found.rate_rps, found.failed_rps
    trials = [
        {"rate_rps": t.rate_rps, "held": t.held, "attainment": t.report.attainment_all}
        for t in found.trials
    ]
    if low and high / low <= WIDEST:
        document = {"rate_rps": low, "failed_rps": high, "trials": trials}
        path.write_text(json.dumps(document) + "\n")
        part.unlink(missing_ok=True)
    else:
        next_rps = high / 2 if not low else low * 2 if math.isinf(high) else math.sqrt(low * high)
        part.write_text(json.dumps({"next_rps": next_rps, "trials": trials}) + "\n")
        print(f"{path.stem}: {low:.1f} to {high:.1f} req/s is too wide, again", file=sys.stderr)


def row_of(load: Load, cluster: str, folder: Folder) -> Row:
    case = case_of(load, cluster)
    predicted = [
        search(load, case, folder, overheads)
        for overheads in (overheads_of(case, folder), Overheads())
    ]
    measured = json.loads(path_of(load, cluster, folder).read_text())
    return Row(
        load=load.name,
        ttft_ms=load.ttft_ms,
        tpot_ms=load.tpot_ms,
        cluster=cluster,
        measured_rps=measured["rate_rps"],
        failed_rps=measured["failed_rps"],
        predicted_rps=predicted[0].rate_rps,
        low_rps=predicted[0].low_rps,
        high_rps=predicted[0].high_rps,
        profile_only_rps=predicted[1].rate_rps,
    )


def search(load: Load, case: Case, folder: Folder, overheads: Overheads) -> Goodput:
    policy = load.policy
    deployment = with_targets(case.twin(source_of(case, folder), overheads), policy)
    found = GoodputSearch(
        lambda workload, stop: simulate(deployment, workload, stop=stop),
        load.spec(deployment.max_model_len),
        seeds=SEEDS,
    )
    return found.find(JointJudge(policy=policy), 10.0)


async def measure(load: Load, case: Case, start_rps: float) -> Found:
    """The search that `bench --find-goodput` runs; trials of each rate in short."""
    async with running(
        case.path, case.overrides, load.policy, prompt_seed=PROMPTS, pinned=True
    ) as bench:
        spec = load.spec(bench.settings.spec.max_total_tokens or 1 << 20)
        bench.settings = replace(bench.settings, spec=spec, duration_s=TRIAL_S)
        await warm_up(bench, case)
        began_s = time.monotonic()
        return await find_goodput(
            bench.trial,
            start_rps=start_rps,
            time_left=lambda: time.monotonic() - began_s + 1.3 * TRIAL_S < SEARCH_S,
        )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Which cluster each would have chosen, with the ratio of 1P1D to two colocated."""
    words = []
    for name in dict.fromkeys(row.load for row in rows):
        pair = {row.cluster: row for row in rows if row.load == name}
        if len(pair) < len(CLUSTERS):
            continue
        one, other = (pair[cluster] for cluster in CLUSTERS)
        ratios = {
            what: getattr(one, field) / max(getattr(other, field), 1e-9)
            for what, field in (
                ("measured", "measured_rps"),
                ("predicted", "predicted_rps"),
                ("predicted from the profile alone", "profile_only_rps"),
            )
        }
        told = ", ".join(
            f"{what} {ratio:.2f} ({CLUSTERS[0] if ratio > 1 else CLUSTERS[1]})"
            for what, ratio in ratios.items()
        )
        words.append(f"{name}: 1P1D over two colocated: {told}")
    return words


def table(rows: Sequence[Row]) -> Table:
    page = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("workload", "TTFT, TPOT", "cluster", "measured", "predicted", "profile alone"):
        page.add_column(name)
    for row in rows:
        page.add_row(
            row.load,
            f"{row.ttft_ms:g}, {row.tpot_ms:g} ms",
            row.cluster,
            f"{row.measured_rps:.1f} to {row.failed_rps:.1f}",
            f"{row.predicted_rps:.1f} ({row.low_rps:.1f} to {row.high_rps:.1f})",
            f"{row.profile_only_rps:.1f}",
        )
    return page


if __name__ == "__main__":
    sys.exit(main())
