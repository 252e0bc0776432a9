"""A plan for this machine's cores, launched as it was written, against what it promised.

`phasewise plan` on configs/plan-tiny-cpu.yaml with the profile and the calibration that
`benchmarks/twin.py` measured here (its folder is read), `phasewise serve` on the file that it
wrote, and requests of the plan's own workload: at its own rate, at the rate that the plan promises
and half of it, and at the goodput, where attainment falls by its meaning. The promise keeps the
plan file's headroom for what the twin may be wrong by. Predicted attainment is that of the twin of
the written file at the same rates.

The plan is kept as planned.json and planned.yaml; remove them to plan again.

    python benchmarks/cpu_plan.py [--only-plan] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from live.cases import CASES, CONFIGS
from live.cluster import offered, running
from live.pieces import PROMPTS, SEED, WARM_UP, Folder
from phasewise.cluster.cli import main as phasewise
from phasewise.cluster.commands.status import to_text
from phasewise.configs.load import load_cluster, load_plan
from phasewise.placement.latency.step_profile import read_profile
from phasewise.placement.simulation.calibration import read_calibration
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.simulation.twin import twin_of, with_targets
from phasewise.placement.workload.slo import SloPolicy, SloTargets, met
from phasewise.placement.workload.workload import Workload, WorkloadSpec, parse_workload
from rich.table import Table

PLAN = CONFIGS / "plan-tiny-cpu.yaml"
FOLDER = Path(__file__).parent / "results" / "twin"
MEASURED = "cpu-colocated"  # the case whose profile and calibration are taken
SECONDS = 15.0  # of arrivals at each
NOISE = 0.05  # of attainment, that a run of some hundred requests may differ by


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    rate_rps: float
    requests: int
    predicted: float
    live: float
    others_share: float
    promised: bool  # by the plan

    @property
    def kept(self) -> bool:
        return self.live >= self.predicted - NOISE


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Rates of a plan, requests a second."""

    own_rps: float  # of its workload
    goodput_rps: float
    promised_rps: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what was measured")
    parser.add_argument(
        "--only-plan", action="store_true", help="launch nothing: that takes no idle machine"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = Folder(path=args.folder)
    cluster = args.folder / "planned.yaml"
    kept = args.folder / "planned.json"
    if not (kept.exists() and cluster.exists()):
        kept.write_text(json.dumps(asdict(write_plan(folder, cluster))) + "\n")
    planned = Planned(**json.loads(kept.read_text()))
    if args.only_plan:
        print(f"{planned.goodput_rps:.1f} req/s, promised {planned.promised_rps:.1f}: {cluster}")
        return 0
    rows = asyncio.run(measure(folder, cluster, planned))
    found = [asdict(row) | {"kept": row.kept} for row in rows]
    document = asdict(planned) | {"rows": found}
    (args.folder / "cpu-plan.json").write_text(json.dumps(document, indent=1) + "\n")
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        told = f"{planned.goodput_rps:.1f} req/s, promised {planned.promised_rps:.1f}"
        print(f"planned goodput {told}: {cluster}")
        print(to_text(table(rows)))
    return 0 if all(row.kept for row in rows if row.promised) else 1


def write_plan(folder: Folder, cluster: Path) -> Planned:
    case = CASES[MEASURED]
    changes = {
        "latency.source": "profile",
        "latency.file": folder.profile(case),
        "latency.calibration": folder.calibration(case),
        "model.serve_path": load_cluster(case.path).model.path,
    }
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = phasewise(["plan", str(PLAN), "--json", "-o", str(cluster), *words])
    if status:
        raise SystemExit(f"phasewise plan ended with {status}")
    best = json.loads(out.getvalue())["best"]
    return Planned(
        own_rps=float(load_plan(PLAN).workload["rate_rps"]),
        goodput_rps=float(best["goodput_rps"]),
        promised_rps=float(best["promised_rps"]),
    )


async def measure(folder: Folder, cluster: Path, planned: Planned) -> list[Row]:
    case, config = CASES[MEASURED], load_cluster(cluster)
    targets = SloTargets(ttft_s=config.slo.ttft_ms / 1e3, tpot_s=config.slo.tpot_ms / 1e3)
    policy = SloPolicy(default=targets, classes={})
    source = read_profile(folder.profile(case))
    overheads = read_calibration(folder.calibration(case)).overheads
    twin = with_targets(twin_of(config, source, overheads=overheads), policy)
    spec = parse_workload(load_plan(PLAN).workload, base=PLAN.parent)
    rows = []
    async with running(cluster, (), policy, prompt_seed=PROMPTS, pinned=True) as bench:
        for row in range(WARM_UP):
            await bench.offer(load_of(spec, 1.0, twin.max_model_len).take(np.array([row])))
        promised = planned.promised_rps
        for rate_rps in (planned.own_rps, promised / 2, promised, planned.goodput_rps):
            load = load_of(spec, rate_rps, twin.max_model_len)
            run, simulated = await offered(bench, load), simulate(twin, load)
            rows.append(
                Row(
                    rate_rps=load.rate_rps,
                    requests=load.num_requests,
                    predicted=float(np.mean(met(simulated.ttft_s, simulated.tpot_s, targets))),
                    live=float(np.mean(met(run.ttft_s, run.tpot_s, targets))),
                    others_share=run.others_share,
                    promised=rate_rps <= promised,
                )
            )
    return rows


def load_of(spec: WorkloadSpec, rate_rps: float, max_model_len: int) -> Workload:
    count = max(WARM_UP, round(rate_rps * SECONDS))
    spec = replace(spec, num_requests=count, max_total_tokens=max_model_len)
    return spec.build(SEED, rate_rps=rate_rps)


def table(rows: Sequence[Row]) -> Table:
    page = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("req/s", "requests", "predicted", "live", "kept", "others"):
        page.add_column(name, justify="right")
    for row in rows:
        page.add_row(
            f"{row.rate_rps:.1f}",
            str(row.requests),
            f"{row.predicted:.1%}",
            f"{row.live:.1%}",
            ("yes" if row.kept else "NO") if row.promised else "not promised",
            f"{row.others_share:.0%}",
        )
    return page


if __name__ == "__main__":
    sys.exit(main())
