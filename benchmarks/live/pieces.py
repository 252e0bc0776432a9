"""A case in pieces, each a file: what is there is not measured again.

A profile of the machine, a calibration run and what was fitted to it, and a run at each rate. So a
benchmark can be run a little at a time, and its result put together from what there is.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from live.cases import Case
from live.cluster import Served, offered, running
from phasewise.cluster.commands.bench import Bench
from phasewise.cluster.commands.profile import profile_of
from phasewise.placement.latency.step_profile import StepProfile, read_profile, write_profile
from phasewise.placement.simulation.calibration import read_calibration, write_calibration
from phasewise.placement.simulation.calibration_fit import calibration_load, fit_overheads
from phasewise.placement.simulation.deployment import Overheads
from phasewise.placement.workload.workload import Workload

PROFILE_S = 45.0
LAUNCH_S = 20.0  # to launch and end a cluster, roughly
DRAIN_S = 4.0
SEED = 5
PROMPTS = 11  # seed of token ids; each load has its own
WARM_UP, WARM_UP_TOKENS = 8, 16
DISTURBED = 0.1  # of a core, taken by others: measured again, and not kept
ATTEMPTS = 2
REPEATS = 3  # of each load


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """Where the pieces of all cases are."""

    path: Path

    def profile(self, case: Case) -> Path:
        return self.path / f"{case.measured}-profile.json"

    def calibration_runs(self, case: Case) -> list[Path]:
        return [self.path / f"{case.name}-calibration-run-{i}.json" for i in range(REPEATS)]

    def calibration(self, case: Case) -> Path:
        return self.path / f"{case.name}-calibration.json"

    def runs(self, case: Case, rate_rps: float) -> list[Path]:
        return [self.path / f"{case.name}-{rate_rps:g}-{i}.json" for i in range(REPEATS)]


def source_of(case: Case, folder: Folder) -> StepProfile | None:
    """Step times measured here; None for a paced cluster, which names its own."""
    return read_profile(folder.profile(case)) if case.cores else None


def overheads_of(case: Case, folder: Folder) -> Overheads:
    return read_calibration(folder.calibration(case)).overheads


def fill(case: Case, folder: Folder, *, until_s: float) -> bool:
    """Measure what is missing, as far as time goes; whether everything was measured once."""
    if case.cores and not folder.profile(case).exists():
        if time.monotonic() + PROFILE_S > until_s:
            return False
        profile, _ = profile_of(case.cluster(), within_s=PROFILE_S, quick=False)
        write_profile(profile, folder.profile(case))
    loads = missing(case, folder)
    if loads and time.monotonic() + LAUNCH_S + duration_s(loads[0][1]) < until_s:
        asyncio.run(_measure(case, loads, until_s))
    left = {path for path, _ in missing(case, folder)}
    return not any(runs[0] in left for runs in _all_runs(case, folder))


def missing(case: Case, folder: Folder) -> list[tuple[Path, Workload]]:
    """Every load once before any is repeated: a machine that slows down for a while then spoils
    one repeat of each, and medians do not see it."""
    loads = [calibration_of(case), *(case.load(rate, SEED) for rate in case.rates)]
    return [
        (runs[i], load)
        for i in range(REPEATS)
        for runs, load in zip(_all_runs(case, folder), loads, strict=True)
        if not runs[i].exists()
    ]


def _all_runs(case: Case, folder: Folder) -> list[list[Path]]:
    return [folder.calibration_runs(case), *(folder.runs(case, rate) for rate in case.rates)]


def calibration_of(case: Case) -> Workload:
    return calibration_load(case.lengths, answer=case.answer, idle_s=case.idle_s)


def duration_s(load: Workload) -> float:
    return float(load.arrival_s[-1]) + DRAIN_S


async def _measure(case: Case, loads: list[tuple[Path, Workload]], until_s: float) -> None:
    _, policy = case.spec()
    pinned = bool(case.cores)
    async with running(
        case.path, case.overrides, policy, prompt_seed=PROMPTS, pinned=pinned
    ) as bench:
        await warm_up(bench, case)
        for path, load in loads:
            for _ in range(ATTEMPTS):
                if time.monotonic() + duration_s(load) + LAUNCH_S / 2 > until_s:
                    return
                found = await offered(bench, load)
                if found.others_share <= DISTURBED:
                    path.write_text(json.dumps(_columns(found)) + "\n")
                    break
            else:
                print(f"{path.stem}: others took part of the cores; not kept", file=sys.stderr)


async def warm_up(bench: Bench, case: Case) -> None:
    load = case.load(1.0, SEED + 1)
    load = replace(load, output_tokens=np.minimum(load.output_tokens, WARM_UP_TOKENS))
    for row in range(WARM_UP):
        await bench.offer(load.take(np.array([row])))


def calibrate(case: Case, folder: Folder) -> None:
    """Anew where a run or the profile is younger than what was found."""
    sources = [path for path in folder.calibration_runs(case) if path.exists()]
    sources += [folder.profile(case)] if case.cores else []
    path = folder.calibration(case)
    if path.exists() and path.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return
    run, load = read_runs(folder.calibration_runs(case)), calibration_of(case)
    if len(run.ttft_s) != load.num_requests:
        raise SystemExit(f"{folder.calibration_runs(case)[0]} is of another load: remove it")
    source = source_of(case, folder)
    found = fit_overheads(
        lambda overheads: case.twin(source, overheads),
        load,
        run.ttft_s,
        run.tpot_s,
        cores=case.cores,
        serving_s=run.serving_s,
    )
    origin = f"measured {date.today()} on {case.name}; its own run is predicted {found.accuracy}"
    write_calibration(found.overheads, origin, path)


def _columns(found: Served) -> dict[str, Any]:
    return {
        name: np.round(value, 7).tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(found).items()
    }


def read_runs(paths: Sequence[Path]) -> Served:
    """One run of the same load out of several: each request's median, and the worst of what
    disturbed them."""
    documents = [json.loads(path.read_text()) for path in paths if path.exists()]
    both = {name: [document[name] for document in documents] for name in documents[0]}
    columns = {"ttft_s", "tpot_s", "gap_s", "serving_s"}
    return Served(
        **{
            name: np.median(np.array(values, float), axis=0) if name in columns else max(values)
            for name, values in both.items()
        }
    )
