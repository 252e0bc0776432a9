"""Output tokens/s against vLLM on the same cores, same checkpoints, same load, in one run.

    python benchmarks/engine.py --vllm VENV [--json] [--cases 4M 81M pair] [--rounds 5]

Every server of a case is up at the same time and they take turns, round by round, after a first
one that is discarded; the median counts. A round that lost streams is told and counted as such,
and its server begun anew. The pairs run one at a time, begun anew for every round, with a short
warm-up in place of the discarded round: four workers would share the two cores. A peer
that is not installed is skipped aloud. `benchmarks/peers/README.md` tells how to install vLLM's CPU
build. However this command ends, its servers end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from peers.openai_load import Load
from peers.random_checkpoint import SHAPES, write_checkpoint
from peers.rounds import Contender, Rounds, Server
from peers.servers import PeerMissing, phasewise, vllm, vllm_pair
from rich.console import Console
from rich.table import Table

LARGE = Load(num_requests=100, input_tokens=256, output_tokens=64, concurrency=100)
WIDE = Load(num_requests=32, input_tokens=128, output_tokens=32, concurrency=32)
CASES = ("4M", "81M", "pair")
PAIR = Load(num_requests=60, input_tokens=256, output_tokens=64, concurrency=16)
PAIR_WARM_UP = Load(num_requests=16, input_tokens=256, output_tokens=64, concurrency=16)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: `goal` is the ratio of output tokens/s that we hold ourselves to."""

    shape: str
    load: Load
    goal: float
    servers: dict[str, Server]
    warm_up: Load
    fresh: bool = False  # one server at a time, begun anew for every round

    def rounds(self, title: str, name: str) -> Rounds:
        contender = Contender(
            name=f"{title}: {name}",
            server=self.servers[name],
            model=self.shape,
            load=self.load,
            warm_up=self.warm_up,
            fresh=self.fresh,
        )
        return Rounds(contender)


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
        "4M": Case("4M", LARGE, 1.5, colocated(small), LARGE),
        "81M": Case("81M", WIDE, 1.0, colocated(large), WIDE),
        "pair": Case("4M", PAIR, 2.0, pair, PAIR_WARM_UP, fresh=True),
    }


def run_case(case: Case, rounds: int, title: str, case_s: float) -> dict[str, Rounds]:
    """What the rounds came to, by server; none begins later than `case_s`. A peer that is missing
    is left out."""
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(case.rounds(title, name)) for name in case.servers}
        for seed in range(1 if case.fresh else 0, rounds + 1):  # 0: starts and warm-ups
            if time.monotonic() - began_s > case_s:
                print(f"{title}: {seed - 1} of {rounds} rounds in {case_s:g} s", file=sys.stderr)
                break
            for name, one in list(running.items()):
                try:
                    one.run(seed) if seed else one.start()
                except PeerMissing as missing:
                    print(f"{title}: {name} is skipped: {missing}", file=sys.stderr)
                    del running[name]
    return running


def summary(case: Case, running: dict[str, Rounds]) -> dict[str, object]:
    """Medians by server, and the ratio of output tokens/s to vLLM's, round by round."""
    counted = {name: one.counted() for name, one in running.items()}
    ours, theirs = counted["phasewise"], counted.get("vllm", {})
    ratios = [
        ours[seed].output_tokens_per_s / theirs[seed].output_tokens_per_s
        for seed in ours
        if seed in theirs
    ]
    return {
        "load": f"{case.load.num_requests} x ({case.load.input_tokens}/{case.load.output_tokens}), "
        f"{case.load.concurrency} at once",
        "medians": {name: one.medians() for name, one in running.items() if counted[name]},
        "ratio": round(statistics.median(ratios), 2) if ratios else None,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "goal": case.goal,
        "servers": {name: one.as_json() for name, one in running.items()},
    }


def machine() -> str:
    named = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name = named[0].partition(":")[2].strip() if named else platform.processor()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {name}, {gib:.0f} GiB"


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
        "whole",
        "lost",
        "ratio",
        "goal",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "server") else "right")
    for name, case in report.items():
        medians, servers = case["medians"], case["servers"]
        assert isinstance(medians, dict) and isinstance(servers, dict)
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
                f"{servers[server]['whole']} of {servers[server]['rounds']}",
                f"{servers[server]['lost_streams']}",
                f"{case['ratio']}" if ours else "",
                f"{case['goal']}" if ours else "",
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--vllm", type=Path, default=Path("peers-venv"), help="vLLM's venv")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--case-s", type=float, default=1200.0, help="no round of a case begins later"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    report: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = cases(Path(folder), options.vllm.absolute())
        for name in options.cases:
            running = run_case(chosen[name], options.rounds, name, options.case_s)
            report[name] = summary(chosen[name], running)
    if not options.json:
        show(report)
        return
    asked = f"--cases {' '.join(options.cases)} --rounds {options.rounds}"
    made = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "command": f"python benchmarks/engine.py --vllm VENV --json {asked}",
        "cases": report,
    }
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
