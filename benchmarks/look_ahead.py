"""What it brings to give out a step before the tokens of the one before are known.

    python benchmarks/look_ahead.py [--config C.yaml] [--batch 64 8] [--steps 128] [--rounds 5]

A live decode worker, loop, compute thread, gRPC and all, with a gateway's link in another process,
is timed with the scheduler as it is and with one that waits for each step's tokens, in turn, the
first round not counted. Medians; the ratio is that of output tokens/s within one round. What is
hidden shows in `overhead_ms`, and what that costs the model, which then waits for the interpreter
lock, in `model_ms`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from phasewise.cluster import assembly
from phasewise.cluster.checkpoint import resolve
from phasewise.cluster.profiling.step_parts import StepParts, measure_step_parts
from phasewise.cluster.resources import worker_specs
from phasewise.configs.load import load_cluster
from phasewise.decode_worker.scheduler import DecodeScheduler
from phasewise.engine.batch import Batch

ROOT = Path(__file__).parents[1]


class InTurn(DecodeScheduler):
    """Gives out nothing while a step is in flight."""

    def _following(self) -> Batch | None:
        return None


WAYS: dict[str, type[DecodeScheduler]] = {"in turn": InTurn, "ahead": DecodeScheduler}


def main() -> None:
    args = _arguments()
    config = resolve(load_cluster(args.config, ()))
    cores = len(os.sched_getaffinity(0))
    (spec, *_) = [spec for spec in worker_specs(config, cores) if spec.role == "decode"]
    found = {}
    for batch in args.batch:
        rounds: dict[str, list[StepParts]] = {way: [] for way in WAYS}
        for _ in range(args.rounds + 1):
            for way, scheduler in WAYS.items():
                assembly.DecodeScheduler = scheduler  # pyright: ignore[reportPrivateImportUsage]
                rounds[way].append(measure_step_parts(spec, batch=batch, steps=args.steps))
        found[batch] = {way: steps[1:] for way, steps in rounds.items()}
    rows = [row for batch, ways in found.items() for row in _rows(batch, ways)]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def _rows(batch: int, ways: dict[str, list[StepParts]]) -> list[dict[str, Any]]:
    rows = []
    for way, steps in ways.items():
        ratios = [
            _tokens_per_s(one) / _tokens_per_s(base)
            for one, base in zip(steps, ways["in turn"], strict=True)
        ]
        rows.append(
            {
                "batch": batch,
                "way": way,
                "step_ms": round(median(_step_ms(one) for one in steps), 3),
                "model_ms": round(median(one.parts_ms["model"] for one in steps), 3),
                "overhead_ms": round(median(one.overhead_ms for one in steps), 3),
                "tokens_per_s": round(median(_tokens_per_s(one) for one in steps)),
                "ratio": round(median(ratios), 3),
            }
        )
    return rows


def _step_ms(parts: StepParts) -> float:
    return sum(parts.parts_ms.values())


def _tokens_per_s(parts: StepParts) -> float:
    return parts.rows / _step_ms(parts) * 1e3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "local.yaml")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
