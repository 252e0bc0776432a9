"""Measure how long steps take on the hardware at hand, for plan, simulate and paced clusters.

Loads the model of a cluster file as its workers do, with their device, threads, dtype and limits,
and times prompts over token counts and contexts and decoding over rows and contexts. No Ray, no
network: the steps alone. Leave the machine to it meanwhile. Prints the fitted coefficients and how
well points are predicted that the fit has not seen.

With --step it starts a decode worker as it is in service, has it decode one full batch, and prints
where a step's time goes: schedule, prepare, model, sample, emit, switch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ... import __version__
from ...configs.errors import InvalidConfig
from ...configs.load import load_cluster
from ...configs.schema import ClusterConfig
from ...engine.rank import resolve_dtype
from ...engine.runner import Runner, build_runner
from ...placement.latency.fitting import Point, fit_coefficients, fit_knots, medians
from ...placement.latency.step_profile import ProfilePoint, StepProfile, write_profile
from ..checkpoint import resolve
from ..cli import EXIT_OK, add_config_arguments, check_writable
from ..profiling.measure import Timed, measure
from ..profiling.points import Room, Step, decode_steps, prefill_steps
from ..profiling.step_parts import measure_step_parts
from ..resources import resources_here, worker_specs
from ..spec import WorkerSpec
from .status import to_text

EXAMPLES = """\
  phasewise profile configs/local.yaml -o profile.json
  phasewise profile configs/local.yaml -o profile.json --quick --set prefill.threads=2
  phasewise profile configs/local.yaml --step --batch 64"""

WITHIN_S, QUICK_S = 120.0, 20.0
FOLDS = 8
NOISY = 0.1
PHASES = ("prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("-o", "--output", metavar="PROFILE.json", type=Path)
    parser.add_argument(
        "--step",
        action="store_true",
        help="instead, run a live decode worker and print where a step's time goes",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="with --step: rows [max_batch_size]")
    parser.add_argument("--steps", type=int, metavar="N", default=128, help="with --step [128]")
    parser.add_argument("--quick", action="store_true", help=f"a coarse grid, {QUICK_S:g} s")
    parser.add_argument("--within-s", type=float, metavar="S", help=f"time at most [{WITHIN_S:g}]")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    config = resolve(load_cluster(args.config, args.overrides))
    if args.step:
        return _step(config, args)
    within_s = args.within_s
    if within_s is None:
        within_s = QUICK_S if args.quick else WITHIN_S
    if not 0 < within_s <= 3600:
        raise InvalidConfig("--within-s", f"{within_s:g} s", "give 1 to 3600 seconds")
    if args.output is None:
        raise InvalidConfig("--output", "is missing", "name the file to write, as in -o p.json")
    check_writable("--output", args.output)
    profile, left_out = profile_of(config, within_s=within_s, quick=args.quick)
    write_profile(profile, args.output)
    fits = [fit for phase in PHASES if (fit := fit_of(profile, phase)) is not None]
    if args.json:
        found = {"output": str(args.output), "origin": profile.origin, "left_out": len(left_out)}
        print(json.dumps({**found, "fits": [fit.as_json() for fit in fits]}, indent=1))
    else:
        print(_text(profile, fits, left_out, args.output))
    return EXIT_OK


def _step(config: ClusterConfig, args: argparse.Namespace) -> int:
    spec = _specs(config)["decode"]
    if spec.num_ranks > 1:
        raise InvalidConfig(
            "decode.tensor_parallel, decode.pipeline_parallel",
            "a step's parts are measured on one rank",
            "set both to 1, as in --set decode.tensor_parallel=1",
        )
    found = measure_step_parts(
        spec,
        batch=config.decode.max_batch_size if args.batch is None else args.batch,
        steps=args.steps,
    )
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
        return EXIT_OK
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part")
    table.add_column("ms a step", justify="right")
    table.add_column("while it computes", justify="right")
    for part, ms in found.parts_ms.items():
        aside_ms = found.aside_ms.get(part)
        table.add_row(part, f"{ms:.3f}", "" if aside_ms is None else f"{aside_ms:.3f}")
    aside_ms = sum(found.aside_ms.values())
    table.add_row("all but the model", f"{found.overhead_ms:.3f}", f"{aside_ms:.3f}")
    head = (
        f"{config.model.path.name}: {found.steps} decode steps of {found.rows:g} rows, "
        f"{found.following} given out before the one before was back"
    )
    print(f"{head}\n{to_text(table)}")
    return EXIT_OK


def profile_of(
    config: ClusterConfig, *, within_s: float, quick: bool
) -> tuple[StepProfile, list[Step]]:
    """Measure both phases, and the steps that were too slow to be measured.

    Raises InvalidConfig for pools whose hardware differs (a profile is of one kind) and for
    workers of several devices.
    """
    specs = _specs(config)
    devices = {(spec.pool.device, spec.pool.threads) for spec in specs.values()}
    if "paced" in dict(devices):
        raise InvalidConfig(
            "prefill.device, decode.device",
            "paced workers take their times from a hardware sheet: there is nothing to measure",
            "profile a cluster file with device: cpu or cuda",
        )
    if len(devices) > 1:
        raise InvalidConfig(
            "prefill.device, decode.device, threads",
            f"a profile is of one kind of worker, not of {sorted(devices)}",
            "set both pools alike, as in --set decode.threads=1 --set prefill.threads=1",
        )
    spec = specs["decode"]
    if spec.pool.tensor_parallel * spec.pool.pipeline_parallel > 1:
        raise InvalidConfig(
            "decode.tensor_parallel, decode.pipeline_parallel",
            "a profile is measured on one device",
            "set both to 1, as in --set decode.tensor_parallel=1",
        )
    runner = _runner(spec)
    steps = _steps(config, runner, quick=quick)
    timed, left_out = _measure(runner, steps, within_s)
    hardware = hardware_name(spec.pool.device, spec.pool.threads)
    points = tuple(point for entry in timed for point in _points(entry))
    return StepProfile(
        hardware=hardware,
        model=config.model.path.name,
        dtype=resolve_dtype(runner.spec, config.model.dtype),
        origin=f"measured {datetime.date.today()} by phasewise profile {__version__} on {hardware}",
        points=points,
    ), left_out


def _specs(config: ClusterConfig) -> dict[str, WorkerSpec]:
    """One worker of each role, threads filled in as `serve` does."""
    cores = len(os.sched_getaffinity(0))
    if "cuda" in (config.prefill.device, config.decode.device) and not resources_here()["GPU"]:
        raise InvalidConfig(
            "prefill.device, decode.device",
            "cuda, while this machine shows no GPU",
            "profile where there is one, or set both to cpu",
        )
    return {spec.role: spec for spec in worker_specs(config, cores)}


def _runner(spec: WorkerSpec) -> Runner:
    runner = build_runner(
        spec.model.path,
        dtype=spec.model.dtype,
        kv_dtype=spec.kv.dtype,
        device=spec.pool.device,
        threads=spec.pool.threads or None,
        block_size=spec.kv.block_size,
        max_model_len=spec.model.max_model_len,
        memory_bytes=spec.kv.memory,
    )
    runner.cache.pool.zero_()  # NaN and denormal numbers would be slow, or refused
    runner.warm_up()
    return runner


def _steps(config: ClusterConfig, runner: Runner, *, quick: bool) -> list[Step]:
    layout = runner.layout
    prefill = config.prefill.max_batch_tokens if config.prefill.replicas else 0
    room = Room(
        max_model_len=runner.max_model_len,
        max_batch_tokens=max(prefill, config.decode.max_batch_tokens),
        max_batch_size=config.decode.max_batch_size,
        pool_tokens=layout.num_blocks * layout.block_size,
    )
    return sorted(
        prefill_steps(room, quick=quick) + decode_steps(room, quick=quick), key=lambda s: s.size
    )


def _measure(
    runner: Runner, steps: Sequence[Step], within_s: float
) -> tuple[list[Timed], list[Step]]:
    console = Console(stderr=True)
    columns = (TextColumn(f"{len(steps)} kinds of steps"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        return measure(
            runner,
            steps,
            within_s=within_s,
            progress=lambda share: bar.update(task, completed=share),
        )


def _points(entry: Timed) -> list[ProfilePoint]:
    step = entry.step
    return [
        ProfilePoint(
            phase=step.phase,
            tp=1,
            pp=1,
            new_tokens=step.new_tokens,
            context=step.context,
            batch=step.batch,
            seconds=seconds,
        )
        for seconds in entry.seconds
    ]


def hardware_name(device: str, threads: int) -> str:
    """What computes: the GPU, or the CPU with its threads."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One phase: a plane's coefficients, to be read, and how well the planner's curve predicts
    points that it has not seen."""

    phase: str
    num_points: int
    coefficients: dict[str, float]  # seconds a unit
    held_out_median: float  # relative error
    held_out_p90: float
    noise: float  # half the quartiles' distance over the median, of a point's repeats

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def fit_of(profile: StepProfile, phase: str) -> Fit | None:
    """None where a phase has too few points to leave some out. Whole points are left out with
    all their repeats, never single repeats."""
    points = [(p.features, p.seconds) for p in profile.points if p.phase == phase]
    grid = sorted(medians(points))
    if len(grid) < FOLDS:
        return None
    plane = fit_coefficients(grid)
    errors = _held_out(grid)
    return Fit(
        phase=phase,
        num_points=len(grid),
        coefficients={name: getattr(plane, name) for name in plane.__slots__},
        held_out_median=float(np.median(errors)),
        held_out_p90=float(np.percentile(errors, 90)),
        noise=_noise(points),
    )


def _noise(points: Sequence[Point]) -> float:
    """Of the median point: what a quiet machine keeps below a few per cent."""
    repeats: dict[object, list[float]] = {}
    for features, seconds in points:
        repeats.setdefault(features, []).append(seconds)
    spreads = [np.subtract(*np.percentile(s, (75, 25))) / np.median(s) for s in repeats.values()]
    return float(np.median(spreads)) / 2


def _held_out(grid: Sequence[Point]) -> list[float]:
    errors = []
    for fold in range(FOLDS):
        curve = fit_knots([point for i, point in enumerate(grid) if i % FOLDS != fold])
        errors += [abs(curve.batch_s(f) / seconds - 1) for f, seconds in grid[fold::FOLDS]]
    return errors


def _text(profile: StepProfile, fits: Sequence[Fit], left_out: Sequence[Step], output: Path) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase")
    columns = (
        "points",
        "step",
        "new token",
        "pair",
        "row",
        "context token",
        "error p50",
        "p90",
        "noise",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for fit in fits:
        table.add_row(
            fit.phase,
            str(fit.num_points),
            *(f"{seconds * 1e6:.4g} µs" for seconds in fit.coefficients.values()),
            f"{fit.held_out_median:.1%}",
            f"{fit.held_out_p90:.1%}",
            f"{fit.noise:.1%}",
        )
    words = f"{profile.model}, {profile.dtype}: {profile.origin}\n{to_text(table)}\nwrote {output}"
    if any(fit.noise > NOISY for fit in fits):
        words += "\nwarning: repeats differ much: something else ran on this machine meanwhile"
    if left_out:
        words += f"\n{len(left_out)} kinds of steps were too slow for the time and are left out"
    return words
