"""How long a whole plan takes: OPT-66B on 4 nodes of 8 GPUs, KV anywhere and KV inside nodes.

python benchmarks/plan_search.py --json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from phasewise.configs.load import load_plan
from phasewise.placement.plan import make_plan
from phasewise.placement.problem import read_problem

FILE = Path("configs/plan-opt-66b-sharegpt.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {affinity: measure(affinity) for affinity in ("high", "low", "auto")}
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for affinity, row in found.items():
        print(f"{affinity:<5} {row['seconds']:6.2f} s  {row['best']}")


def measure(affinity: str) -> dict[str, object]:
    """From reading the file to the verified placement."""
    started_s, cpu_s = time.perf_counter(), time.process_time()
    problem = read_problem(
        load_plan(FILE, (f"search.affinity={affinity}", 'search.compare=""')),
        FILE.resolve().parent,
    )
    plan = make_plan(problem, lambda what, share: None)
    return {
        "seconds": round(time.perf_counter() - started_s, 2),
        "cpu_seconds": round(time.process_time() - cpu_s, 2),
        "placements": plan.search.considered,
        "best": str(plan.best.judged.placement),
        "goodput_rps": round(plan.best.judged.rate_rps, 2),
    }


if __name__ == "__main__":
    main()
