"""Find the placement that meets latency targets, and write the cluster file that launches it.

Reads a plan file: the model's config.json, a workload, targets, the machines and an objective
(`configs/plan_schema.py` has every key; `phasewise plan` names a wrong one and its neighbour).
Phases are searched apart, pairs of them together, colocated serving competes, and the best are
verified by simulation on the schedulers that run live. Exit codes: 0 a plan, 2 a file to be mended,
3 nothing can meet what is asked (with what binds, and the nearest target that can be met).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...configs.load import load_plan
from ...placement.report.explain import explain, summary
from ...placement.report.page import report_html
from ...placement.report.plan_file import cluster_yaml, plan_json
from ...placement.search.algorithms import Report
from ...placement.search.infeasible import Infeasible, check_config
from ...placement.search.plan import Plan, make_plan
from ...placement.search.problem import read_problem
from ...placement.search.provision import Provision, options_of, provision
from ...placement.search.sensitivity import Sensitivity, sensitivity
from ..cli import EXIT_OK, add_overrides, check_writable, without_nan

EXIT_INFEASIBLE = 3
EXAMPLES = """\
  phasewise plan configs/plan-qwen3-32b-h200.yaml -o cluster.yaml
  phasewise plan configs/plan-opt-66b-sharegpt.yaml --explain --report report.html
  phasewise plan configs/plan-llama-3.1-8b-h100.yaml --set slo.ttft_ms=200 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="plan file (YAML)")
    add_overrides(parser, example="slo.ttft_ms=200")
    parser.add_argument("-o", "--output", metavar="CLUSTER", help="write the cluster file here")
    parser.add_argument("--report", metavar="HTML", help="write one self-contained page here")
    parser.add_argument("--explain", action="store_true", help="why this one, and what would not")
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    check_writable("--output", args.output)
    check_writable("--report", args.report)
    try:
        plan, flow, changes = _plan(args)
    except Infeasible as error:
        if args.json:
            words = {"binding": error.binding, "reason": error.reason, "nearest": error.nearest}
            print(json.dumps({"feasible": False, **words}, indent=2))
        print(f"phasewise plan: {error}", file=sys.stderr)
        return EXIT_INFEASIBLE
    text = cluster_yaml(plan)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    if args.report:
        page = report_html(plan, flow, changes)
        Path(args.report).write_text(page, encoding="utf-8")
    if args.json:
        took_s = {"seconds": round(time.monotonic() - started_s, 3)}
        found = {"feasible": True, **plan_json(plan, flow), **took_s}
        print(json.dumps(without_nan(found), indent=2))
        return EXIT_OK
    print(summary(plan))
    if args.explain:
        print("\n" + explain(plan, flow, changes))
    if not args.output:
        print("\n" + text, end="")
    return EXIT_OK


def _plan(args: argparse.Namespace) -> tuple[Plan, Provision | None, list[Sensitivity]]:
    """With a progress bar on standard error, where somebody watches."""
    path = Path(args.plan)
    problem = read_problem(load_plan(path, args.overrides), path.resolve().parent)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        check_config(problem)
        plan = make_plan(problem, _reporter(bar))
        changes = sensitivity(plan, _reporter(bar)) if args.explain or args.report else []
        gpus = {name: machine.gpus for name, machine in problem.machines.items()}
        options = options_of(plan.search)
        flow = provision(options, gpus, problem.config.objective, problem.needed_rps)
    return plan, flow, changes


def _reporter(bar: Progress) -> Report:
    tasks: dict[str, int] = {}

    def report(what: str, share: float) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=1.0)
        bar.update(tasks[what], completed=share)  # type: ignore[arg-type]

    return report
