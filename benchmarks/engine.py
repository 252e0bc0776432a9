"""Output tokens/s against vLLM on the same cores, same checkpoints, same load, in one run.

    python benchmarks/engine.py --vllm VENV [--json] [--cases 4M 81M pair] [--rounds 5]

Every server of a case is up at the same time and they take turns, round by round; the first
round is discarded and the median of the others counts. A peer that is not installed is skipped
aloud. `benchmarks/peers/README.md` tells how to install vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from peers.openai_load import Load, LoadResult, run_load
from peers.random_checkpoint import SHAPES, write_checkpoint
from peers.servers import PeerMissing, phasewise, vllm, vllm_pair
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Server = Callable[[], AbstractContextManager[int]]
LARGE = Load(num_requests=100, input_tokens=256, output_tokens=64, concurrency=100)
WIDE = Load(num_requests=32, input_tokens=128, output_tokens=32, concurrency=32)
ATTEMPTS = 3
PAIR = Load(num_requests=60, input_tokens=256, output_tokens=64, concurrency=16)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: `goal` is the ratio of output tokens/s that we hold ourselves to."""

    shape: str
    load: Load
    goal: float
    servers: dict[str, Server]


def cases(folder: Path, venv: Path) -> dict[str, Case]:
    small, large = (write_checkpoint(folder / name, SHAPES[name]) for name in ("4M", "81M"))

    def colocated(checkpoint: Path) -> dict[str, Server]:
        return {
            "phasewise": lambda: phasewise(checkpoint, prefill=0, decode=2, threads=1),
            "vllm": lambda: vllm(venv, checkpoint),
        }

    pair: dict[str, Server] = {
        "phasewise": lambda: phasewise(small, prefill=1, decode=1, threads=1),
        "vllm": lambda: vllm_pair(venv, small),
    }
    return {
        "4M": Case("4M", LARGE, 1.5, colocated(small)),
        "81M": Case("81M", WIDE, 1.0, colocated(large)),
        "pair": Case("4M", PAIR, 2.0, pair),
    }


def run_case(
    case: Case, rounds: int, progress: Progress, title: str
) -> dict[str, list[LoadResult]]:
    """Results by server, first round left out. A peer that is missing has none."""
    results: dict[str, list[LoadResult]] = {name: [] for name in case.servers}
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        for name, server in case.servers.items():
            try:
                ports[name] = stack.enter_context(server())
            except PeerMissing as missing:
                print(f"{title}: {name} is skipped: {missing}", file=sys.stderr)
        task = progress.add_task(title, total=(rounds + 1) * len(ports))
        for seed in range(rounds + 1):
            for name, port in ports.items():
                result = run_whole(port, case, seed, f"{title}: {name}")
                if seed:
                    results[name].append(result)
                progress.advance(task)
    return results


def run_whole(port: int, case: Case, seed: int, title: str) -> LoadResult:
    """One round. One that lost streams is run again, aloud; what is lost every time counts."""
    result = run_load(port, case.shape, case.load, seed)
    for attempt in range(1, ATTEMPTS):
        if not result.lost:
            break
        print(f"{title}: attempt {attempt} of {ATTEMPTS} lost {result.lost}", file=sys.stderr)
        result = run_load(port, case.shape, case.load, seed)
    return result


def summary(case: Case, results: dict[str, list[LoadResult]]) -> dict[str, object]:
    """Medians by server, and the ratio of output tokens/s to vLLM's, round by round."""
    fields = LoadResult.__dataclass_fields__
    medians = {
        name: {f: round(statistics.median(getattr(r, f) for r in rows), 2) for f in fields}
        for name, rows in results.items()
        if rows
    }
    ratios = [
        ours.output_tokens_per_s / theirs.output_tokens_per_s
        for ours, theirs in zip(results["phasewise"], results["vllm"], strict=False)
    ]
    return {
        "load": f"{case.load.num_requests} x ({case.load.input_tokens}/{case.load.output_tokens}), "
        f"{case.load.concurrency} at once",
        "medians": medians,
        "ratio": round(statistics.median(ratios), 2) if ratios else None,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "goal": case.goal,
    }


def show(report: dict[str, dict[str, object]]) -> None:
    table = Table(title="output tokens/s on the same two cores")
    columns = (
        "case",
        "server",
        "tok/s",
        "req/s",
        "TTFT p50",
        "TTFT p90",
        "TPOT p50",
        "lost",
        "ratio",
        "goal",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "server") else "right")
    for name, case in report.items():
        medians = case["medians"]
        assert isinstance(medians, dict)
        for server, row in medians.items():
            ours = server == "phasewise"
            table.add_row(
                f"{name}: {case['load']}" if ours else "",
                server,
                f"{row['output_tokens_per_s']:.0f}",
                f"{row['requests_per_s']:.2f}",
                f"{row['ttft_p50_ms']:.0f} ms",
                f"{row['ttft_p90_ms']:.0f} ms",
                f"{row['tpot_p50_ms']:.1f} ms",
                f"{row['lost']:.0f}",
                f"{case['ratio']}" if ours else "",
                f"{case['goal']}" if ours else "",
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--vllm", type=Path, default=Path("peers-venv"), help="vLLM's venv")
    parser.add_argument("--cases", nargs="+", default=["4M", "81M", "pair"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True)) as progress,
    ):
        chosen = cases(Path(folder), options.vllm.absolute())
        for name in options.cases:
            results = run_case(chosen[name], options.rounds, progress, name)
            report[name] = summary(chosen[name], results)
    print(json.dumps(report, indent=1)) if options.json else show(report)


if __name__ == "__main__":
    main()
