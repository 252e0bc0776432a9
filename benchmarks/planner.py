"""How fast the planner is: one simulation, its cost up to a million requests, and whole plans.

    python benchmarks/planner.py [--json] [--requests 1000000] [--peer-s 1.52]

Simulation: OPT-13B with DistServe's A100 coefficients, prefill TP2, decode TP1, at 4.5 requests a
second, lengths drawn from ShareGPT. Two simulators, medians over repeats, in process CPU seconds
and on the wall: "simulator" drives the schedulers that run live, with KV transfer and memory;
"mirror" is DistServe's own assumptions as recurrences. `--peer-s` is what simdistserve takes for
1,000 such requests on the machine at hand.

Plans: OPT-66B on 4 nodes of 8 GPUs, with KV anywhere (high affinity), KV inside nodes (low), and
the better of both; from reading the file to the verified placement.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phasewise.configs.load import load_plan
from phasewise.placement.latency.distserve_profile import DistServeLatency, read_distserve_profile
from phasewise.placement.latency.transfer import Link
from phasewise.placement.recurrences.distserve_mirror import MirrorPhase, mirror
from phasewise.placement.search.plan import make_plan
from phasewise.placement.search.problem import read_problem
from phasewise.placement.simulation.deployment import Deployment, replicas
from phasewise.placement.simulation.network import Network
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.workload.traces import read_trace
from phasewise.placement.workload.workload import Workload, WorkloadSpec

DATA = Path(__file__).parents[1] / "tests" / "placement" / "data"
MODEL = "facebook/opt-13b"
RATE_RPS = 4.5
KV_BYTES_PER_TOKEN = 2 * 40 * 5120 * 2  # OPT-13B in FP16
KV_TOKENS = 55_000  # what a decode GPU of 80 GB holds beside 26 GB of weights
NVLINK = Link(bytes_per_s=300e9)
PEER_S = 1.52  # simdistserve, 1,000 requests, two shared cores
PLAN = Path(__file__).parents[1] / "configs" / "plan-opt-66b-sharegpt.yaml"


def workload(num_requests: int) -> Workload:
    spec = WorkloadSpec(
        rate_rps=RATE_RPS,
        trace=read_trace(DATA / "nanoflow_sharegpt.csv.gz"),
        num_requests=num_requests,
        max_total_tokens=2048,
    )
    return spec.build(0)


def deployment() -> Deployment:
    source = DistServeLatency(
        model=MODEL, profile=read_distserve_profile(DATA / "distserve_distserve.json")
    )
    blocks = KV_TOKENS // 16
    return Deployment(
        prefill=replicas("prefill", 1, source.phase("prefill", 2, 1), num_blocks=blocks),
        decode=replicas(
            "decode", 1, source.phase("decode", 1, 1), num_blocks=blocks, max_batch_size=256
        ),
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        num_layers=40,
        network=Network(local=NVLINK),
        ttft_ms=250.0,
    )


def mirror_phases() -> tuple[MirrorPhase, MirrorPhase]:
    profile = read_distserve_profile(DATA / "distserve_distserve.json")
    return (
        MirrorPhase(coefficients=profile[MODEL, 2]),
        MirrorPhase(coefficients=profile[MODEL, 1]),
    )


def median_s(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one run, medians."""
    wall, cpu = [], []
    for _ in range(repeats):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - wall_s)
        cpu.append(time.process_time() - cpu_s)
    return statistics.median(wall), statistics.median(cpu)


def counted_as_distserve(requests: Workload) -> Workload:
    """Its output length counts decode steps; one that has none is given one."""
    return Workload(
        arrival_s=requests.arrival_s,
        prompt_tokens=requests.prompt_tokens,
        output_tokens=(requests.output_tokens - 1).clip(min=1),
    )


def measure(largest: int, peer_s: float) -> dict[str, Any]:
    system, phases = deployment(), mirror_phases()
    rows = []
    size = 1000
    while size <= largest:
        requests = workload(size)
        counted = counted_as_distserve(requests)
        repeats = max(1, min(7, 20_000 // size))
        wall_s, cpu_s = median_s(lambda c=counted: mirror(c, *phases), repeats)
        row: dict[str, Any] = {"requests": size, "mirror_s": wall_s, "mirror_cpu_s": cpu_s}
        wall_s, cpu_s = median_s(lambda w=requests: simulate(system, w), repeats)
        row |= {"simulator_s": wall_s, "simulator_cpu_s": cpu_s}
        rows.append(row)
        size *= 10
    first, last = rows[0], rows[-1]
    return {
        "simulation": rows,
        "peer_s": peer_s,
        "mirror_times_peer": peer_s / first["mirror_s"],
        "simulator_times_peer": peer_s / first["simulator_s"],
        "mirror_cost_growth": growth(first, last, "mirror_cpu_s"),
        "simulator_cost_growth": growth(first, last, "simulator_cpu_s"),
    }


def growth(first: dict[str, float], last: dict[str, float], key: str) -> float:
    """Of the cost of one request, from the smallest run to the largest."""
    return last[key] / last["requests"] / (first[key] / first["requests"])


def plan(affinity: str) -> dict[str, object]:
    """From reading the file to the verified placement."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    config = load_plan(PLAN, (f"search.affinity={affinity}", 'search.compare=""'))
    found = make_plan(read_problem(config, PLAN.parent), lambda what, share: None)
    return {
        "seconds": round(time.perf_counter() - wall_s, 2),
        "cpu_seconds": round(time.process_time() - cpu_s, 2),
        "placements": found.search.considered,
        "best": str(found.best.judged.placement),
        "goodput_rps": round(found.best.judged.rate_rps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=1_000_000, help="the largest simulation")
    parser.add_argument("--peer-s", type=float, default=PEER_S, help="simdistserve's seconds")
    args = parser.parse_args()
    plans = {affinity: plan(affinity) for affinity in ("high", "low", "auto")}
    figures: dict[str, Any] = measure(args.requests, args.peer_s) | {"plans": plans}
    if args.json:
        print(json.dumps(figures))
        return
    for row in figures["simulation"]:
        words = [f"{key} {value:.4g}" for key, value in row.items()]
        print("  ".join(words))
    for key, value in figures.items():
        if isinstance(value, float):
            print(f"{key:22s} {value:8.2f}")
    for affinity, row in plans.items():
        print(f"plan, {affinity:<4} affinity {row['seconds']:6.2f} s  {row['best']}")


if __name__ == "__main__":
    main()
