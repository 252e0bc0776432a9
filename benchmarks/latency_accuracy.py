"""How well step times are predicted where they were not measured: whole grid points left out.

Every row fits on part of a published table and predicts the rest. "grid point": all repeats of
one point are left out, the others fitted, for each point in turn. "model" or "shape": the eight
coefficients of a hardware sheet are fitted on other models only. Repeats never stand on both sides.
"half": every other point, in order of tokens, is left out at once. "largest": the fifth of the
points with the most tokens, so that all of them are extrapolated.
Where aiconfigurator-core is installed, its database is one more table: a profile of its steps with
grid points left out, the eight coefficients fitted on other models ("model"), and our sheets as
they are ("everything").

    python benchmarks/latency_accuracy.py [--json] [--data tests/placement/data]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from phasewise.engine.step_time import StepFeatures
from phasewise.placement.latency import tables
from phasewise.placement.latency.aiconfigurator_source import AiconfiguratorLatency
from phasewise.placement.latency.fitting import Point, fit_coefficients, fit_knots, medians
from phasewise.placement.latency.hardware import Hardware, read_hardware
from phasewise.placement.latency.model_shape import ModelShape, read_shape
from phasewise.placement.latency.phase_latency import NoLatency, Phase, PhaseLatency
from phasewise.placement.latency.roofline import RooflineLatency, all_reduce_s, layer_s
from phasewise.placement.latency.step_profile import StepProfile
from scipy.optimize import least_squares

MODELS = Path(__file__).parent.parent / "configs" / "models"
DENSE = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b")
DATABASE_MODELS = (*DENSE, "mixtral-8x7b")
PHASES: tuple[Phase, ...] = ("prefill", "decode")
HELIX = {"llama1_30b": 60, "llama2_70b": 80}  # model -> layers
HELIX_GPUS = ("a100", "v100", "l4", "l4x2", "t4", "t4x2", "t4x4")
A40 = {"flops": 149.7e12, "memory_bandwidth": 0.696e12}  # NVIDIA A40 data sheet
SMALL_BYTES = 2**15  # of an all-reduce: below it latency is all, and scatters
Predictor = Callable[[Sequence[Point]], Callable[[Point], float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    table: str
    left_out: str
    points: int
    median: float  # relative error
    p90: float
    noise: float  # median spread of repeats of one point, by the same measure; NaN: no repeats


def by_knots(points: Sequence[Point]) -> Callable[[Point], float]:
    fitted = fit_knots(points)
    return lambda point: fitted.batch_s(point[0])


def by_plane(points: Sequence[Point]) -> Callable[[Point], float]:
    fitted = fit_coefficients(points)
    return lambda point: fitted.batch_s(point[0])


def leave_points_out(name: str, points: Sequence[Point], fit: Predictor, folds: int) -> Accuracy:
    """Every point predicted by a fit that never saw it; at most `folds` fits."""
    grid = sorted(medians(points))
    errors = []
    for fold in range(min(folds, len(grid))):
        held = grid[fold::folds]
        seen = [point for i, point in enumerate(grid) if i % folds != fold]
        predict = fit(seen)
        errors += [abs(predict(point) / point[1] - 1) for point in held]
    return _accuracy(name, "grid point", errors, noise(points))


def leave_part_out(name: str, points: Sequence[Point], part: str) -> Accuracy:
    """Half of the grid, or its largest fifth, predicted from the rest."""
    grid = sorted(medians(points), key=_size)
    seen, held = grid[::2], grid[1::2]
    if part == "largest":
        cut = len(grid) - max(2, len(grid) // 5)
        seen, held = grid[:cut], grid[cut:]
    predict = by_knots(seen)
    errors = [abs(predict(point) / point[1] - 1) for point in held]
    return _accuracy(name, part, errors)


def all_splits(name: str, points: Sequence[Point]) -> Iterator[Accuracy]:
    yield leave_points_out(name, points, by_knots, folds=100)
    for part in ("half", "largest"):
        yield leave_part_out(name, points, part)


def _size(point: Point) -> tuple[float, float]:
    features = point[0]
    return (
        features.new_tokens + features.decode_rows,
        features.attention + features.decode_context,
    )


def noise(points: Sequence[Point]) -> float:
    """How far a single repeat lies from the median of its point: no prediction errs less."""
    middle = dict(medians(points))
    repeats: dict[StepFeatures, list[float]] = {}
    for features, seconds in points:
        repeats.setdefault(features, []).append(abs(seconds / middle[features] - 1))
    several = [float(np.mean(spread)) for spread in repeats.values() if len(spread) > 1]
    return float(np.median(several)) if several else float("nan")


def _accuracy(
    table: str, left_out: str, errors: Sequence[float], spread: float = float("nan")
) -> Accuracy:
    return Accuracy(
        table=table,
        left_out=left_out,
        points=len(errors),
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        noise=spread,
    )


def _points(profile: StepProfile, phase: str, tp: int) -> list[Point]:
    return [(p.features, p.seconds) for p in profile.points if (p.phase, p.tp) == (phase, tp)]


def splitwise_rows(data: Path) -> Iterator[Accuracy]:
    profiles = tables.read_splitwise(data / "splitwise_perf_model.csv.gz")
    for (model, hardware), profile in profiles.items():
        for tp in sorted({point.tp for point in profile.points}):
            for phase in ("prefill", "decode"):
                points = _points(profile, phase, tp)
                name = f"Splitwise {model} {hardware} TP{tp} {phase}"
                yield from all_splits(name, points)


def helix_rows(data: Path) -> Iterator[Accuracy]:
    for model, layers in HELIX.items():
        for gpu in HELIX_GPUS:
            kind, _, count = gpu.partition("x")
            prompt, decode = (
                data / "helix" / f"{model}_{gpu}_{phase}_bs2time.csv"
                for phase in ("prompt", "decode")
            )
            tp = int(count or 1)
            profile = tables.read_helix(
                prompt, decode, model=model, hardware=kind, tp=tp, num_layers=layers
            )
            for phase in ("prefill", "decode"):
                points = _points(profile, phase, tp)
                yield from all_splits(f"Helix {model} {gpu} {phase}", points)


def vidur_rows(data: Path) -> Iterator[Accuracy]:
    attention = tables.read_vidur_attention(
        data / "vidur_a100_attention_llama2-70b.csv.gz", model="llama2-70b", hardware="a100"
    )
    for phase in ("prefill", "decode"):
        points = _points(attention, phase, 2)
        yield leave_points_out(f"Vidur attention a100 {phase}", points, by_plane, folds=20)
    for path in sorted(data.glob("vidur_*_*llama-*.csv.gz")):
        rows = tables.read_vidur_layers(path)
        for tp in sorted({row.tp for row in rows}):
            points = [(row.features, row.seconds) for row in rows if row.tp == tp]
            name = f"{path.name.removesuffix('.csv.gz').replace('_', ' ', 1)} TP{tp} layer"
            yield from all_splits(name.capitalize(), points)


def unseen_model_rows(data: Path) -> Iterator[Accuracy]:
    """Three coefficients of a sheet, fitted to the operators of the other models."""
    sheets = {"a100": read_hardware("a100-80g"), "h100": read_hardware("h100")}
    sheets["a40"] = replace(sheets["a100"], **A40)
    for gpu, sheet in sheets.items():
        files = sorted(data.glob(f"vidur_{gpu}_*llama-*.csv.gz"))
        rows = {path: tables.read_vidur_layers(path) for path in files}
        for held in files:
            seen = [row for path in files if path != held for row in rows[path]]
            fitted = fit_layers(seen, sheet)
            errors = [
                abs(layer_s(row.shape, row.tokens, row.tp, fitted) / row.seconds - 1)
                for row in rows[held]
            ]
            name = held.name.removesuffix(".csv.gz").replace("_", " ")
            yield _accuracy(f"{name.capitalize()} all TP, layer", "model", errors)


def fit_layers(rows: Sequence[tables.LayerRow], sheet: Hardware) -> Hardware:
    """The sheet with matmul, weight_read and layer_s fitted to measured layers."""

    def fitted(logs: np.ndarray) -> Hardware:
        matmul, weight_read, fixed_s = np.exp(logs).tolist()
        shares = replace(
            sheet.coefficients, matmul=matmul, weight_read=weight_read, layer_s=fixed_s
        )
        return replace(sheet, coefficients=shares)

    def residuals(logs: np.ndarray) -> np.ndarray:
        hardware = fitted(logs)
        times = [layer_s(row.shape, row.tokens, row.tp, hardware) / row.seconds for row in rows]
        return np.log(times)

    start = np.log([0.7, 0.8, 2e-5])
    return fitted(least_squares(residuals, start, loss="soft_l1", f_scale=0.1).x)


def all_reduce_rows(data: Path) -> Iterator[Accuracy]:
    """NCCL between the devices of a DGX, from 32 KiB on, by the sheets, whose two coefficients of
    it were fitted to these very tables."""
    sheets = {"a100_dgx": read_hardware("a100-80g"), "h100_dgx": read_hardware("h100")}
    rows = tables.read_vidur_collective(data / "vidur_all_reduce.csv.gz")
    for machine, sheet in sheets.items():
        for devices in (2, 4, 8):
            errors = [
                abs(all_reduce_s(row.num_bytes, devices, sheet) / row.seconds - 1)
                for row in rows
                if (row.machine, row.devices, row.a_node) == (machine, devices, devices)
                and row.num_bytes >= SMALL_BYTES
            ]
            name = f"Vidur, all-reduce of {devices} on {machine.replace('_', ' ')}"
            yield _accuracy(name, "nothing", errors)


def database_rows(_: Path) -> Iterator[Accuracy]:
    """NVIDIA's database for our example models, all tensor parallelisms together."""
    if importlib.util.find_spec("aiconfigurator_core") is None:
        return
    for gpu in ("h100", "h200"):
        sheet = read_hardware(gpu)
        steps = {name: database_steps(name, gpu) for name in DATABASE_MODELS}
        for name, found in steps.items():
            for phase in ("prefill", "decode"):
                where = f"NVIDIA's database {gpu} {name} {phase}"
                for tp in (1, 4):
                    points = [s.point for s in found if (s.phase, s.tp) == (phase, tp)]
                    if points:
                        yield leave_points_out(f"{where} TP{tp}", points, by_knots, folds=20)
                yield _accuracy(where, "everything", sheet_errors(found, phase, sheet))
        dense = {name: found for name, found in steps.items() if name in DENSE}
        for held in dense:
            seen = [step for name, found in dense.items() if name != held for step in found]
            fitted = fit_sheet(seen, sheet)
            for phase in ("prefill", "decode"):
                errors = sheet_errors(dense[held], phase, fitted)
                yield _accuracy(f"NVIDIA's database {gpu} {held} {phase}", "model", errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseStep:
    shape: ModelShape
    phase: Phase
    tp: int
    point: Point


def database_steps(name: str, gpu: str) -> list[DatabaseStep]:
    shape = read_shape(MODELS / name)
    source = AiconfiguratorLatency(model=MODELS / name, name=name, hardware=gpu)
    found = []
    for tp in (1, 2, 4, 8):
        try:
            profile = source.profile(tp)
        except NoLatency as error:
            print(error, file=sys.stderr)
            continue
        for phase in PHASES:
            points = _points(profile, phase, tp)
            found += [DatabaseStep(shape=shape, phase=phase, tp=tp, point=p) for p in points]
    return found


def sheet_errors(steps: Sequence[DatabaseStep], phase: str, sheet: Hardware) -> list[float]:
    chosen = [step for step in steps if step.phase == phase]
    return [abs(ratio - 1) for ratio in sheet_ratios(chosen, sheet)]


def sheet_ratios(steps: Sequence[DatabaseStep], sheet: Hardware) -> list[float]:
    """Predicted over given."""
    known: dict[tuple[ModelShape, int], PhaseLatency] = {}
    ratios = []
    for step in steps:
        key = step.shape, step.tp
        if key not in known:
            known[key] = RooflineLatency(shape=step.shape, hardware=sheet).phase("mixed", step.tp)
        ratios.append(known[key].total_s(step.point[0]) / step.point[1])
    return ratios


def fit_sheet(steps: Sequence[DatabaseStep], sheet: Hardware) -> Hardware:
    """The sheet with all its coefficients fitted."""
    names = [field.name for field in fields(sheet.coefficients)]

    def fitted(logs: np.ndarray) -> Hardware:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return replace(sheet, coefficients=replace(sheet.coefficients, **values))

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.log(sheet_ratios(steps, fitted(logs)))

    start = np.log([getattr(sheet.coefficients, name) for name in names])
    return fitted(least_squares(residuals, start, loss="soft_l1", f_scale=0.1, max_nfev=30).x)


SECTIONS = (
    splitwise_rows,
    helix_rows,
    vidur_rows,
    unseen_model_rows,
    all_reduce_rows,
    database_rows,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent.parent / "tests" / "placement" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row for section in SECTIONS for row in section(arguments.data)]
    if arguments.json:
        plain = [{k: v for k, v in asdict(row).items() if v == v} for row in rows]
        print(json.dumps(plain, indent=1))
        return
    print(f"{'table':58} {'left out':10} {'points':>6} {'median':>7} {'p90':>7} {'noise':>7}")
    for row in rows:
        spread = "" if np.isnan(row.noise) else f"{row.noise:7.1%}"
        errors = f"{row.median:7.1%} {row.p90:7.1%} {spread}"
        print(f"{row.table:58} {row.left_out:10} {row.points:6} {errors}")


if __name__ == "__main__":
    main()
