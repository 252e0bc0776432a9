"""How fast one simulation is, and how its cost grows with the number of requests.

    python benchmarks/planner.py [--json] [--requests 1000000] [--peer-s 1.52]

OPT-13B with DistServe's A100 coefficients, prefill TP2, decode TP1, at 4.5 requests a second,
lengths drawn from ShareGPT. Two simulators, medians over repeats, in process CPU seconds and on
the wall: "simulator" drives the schedulers that run live, with KV transfer and memory; "mirror"
is DistServe's own assumptions as recurrences. `--peer-s` is what simdistserve takes for 1,000
such requests on the machine at hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from phasewise.placement.deployment import Deployment, replicas
from phasewise.placement.distserve_mirror import MirrorPhase, mirror
from phasewise.placement.distserve_profile import DistServeLatency, read_distserve_profile
from phasewise.placement.network import Network
from phasewise.placement.simulator import simulate
from phasewise.placement.traces import read_trace
from phasewise.placement.transfer import Link
from phasewise.placement.workload import Workload, WorkloadSpec

DATA = Path(__file__).parents[1] / "tests" / "placement" / "data"
MODEL = "facebook/opt-13b"
RATE_RPS = 4.5
KV_BYTES_PER_TOKEN = 2 * 40 * 5120 * 2  # OPT-13B in FP16
KV_TOKENS = 55_000  # what a decode GPU of 80 GB holds beside 26 GB of weights
NVLINK = Link(bytes_per_s=300e9)
PEER_S = 1.52  # simdistserve, 1,000 requests, two shared cores
LARGEST_SIMULATED = 100_000  # beyond it, only the recurrences


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


def measure(largest: int, peer_s: float) -> dict[str, object]:
    system, phases = deployment(), mirror_phases()
    rows = []
    size = 1000
    while size <= largest:
        requests = workload(size)
        counted = counted_as_distserve(requests)
        repeats = max(1, min(7, 20_000 // size))
        wall_s, cpu_s = median_s(lambda c=counted: mirror(c, *phases), repeats)
        row = {"requests": size, "mirror_s": wall_s, "mirror_cpu_s": cpu_s}
        if size <= LARGEST_SIMULATED:
            wall_s, cpu_s = median_s(lambda w=requests: simulate(system, w), repeats)
            row |= {"simulator_s": wall_s, "simulator_cpu_s": cpu_s}
        rows.append(row)
        size *= 10
    first = rows[0]
    return {
        "simulation": rows,
        "peer_s": peer_s,
        "mirror_times_peer": peer_s / first["mirror_s"],
        "simulator_times_peer": peer_s / first["simulator_s"],
        "mirror_cost_growth": rows[-1]["mirror_cpu_s"]
        / rows[-1]["requests"]
        / (first["mirror_cpu_s"] / first["requests"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=1_000_000, help="the largest simulation")
    parser.add_argument("--peer-s", type=float, default=PEER_S, help="simdistserve's seconds")
    args = parser.parse_args()
    figures = measure(args.requests, args.peer_s)
    if args.json:
        print(json.dumps(figures))
        return
    for row in figures["simulation"]:
        words = [f"{key} {value:.4g}" for key, value in row.items()]
        print("  ".join(words))
    for key in ("mirror_times_peer", "simulator_times_peer", "mirror_cost_growth"):
        print(f"{key:22s} {figures[key]:8.2f}")


if __name__ == "__main__":
    main()
