"""How well step times are predicted where they were not measured: whole grid points left out.

Every row fits on part of a published table and predicts the rest. "grid point": all repeats of
one point are left out, the others fitted, for each point in turn. "model" or "shape": the eight
coefficients of a hardware sheet are fitted on other models only. Repeats never stand on both sides.

    python benchmarks/latency_accuracy.py [--json] [--data tests/placement/data]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from phasewise.placement import tables
from phasewise.placement.fitting import Point, fit_coefficients, fit_knots, medians
from phasewise.placement.hardware import Hardware, read_hardware
from phasewise.placement.roofline import layer_s
from phasewise.placement.step_profile import StepProfile
from scipy.optimize import least_squares

HELIX = {"llama1_30b": 60, "llama2_70b": 80}  # model -> layers
HELIX_GPUS = ("a100", "v100", "l4", "l4x2", "t4", "t4x2", "t4x4")
A40 = {"flops": 149.7e12, "memory_bandwidth": 0.696e12}  # NVIDIA A40 data sheet
Predictor = Callable[[Sequence[Point]], Callable[[Point], float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    table: str
    left_out: str
    points: int
    median: float  # relative error
    p90: float


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
    return _accuracy(name, "grid point", errors)


def _accuracy(table: str, left_out: str, errors: Sequence[float]) -> Accuracy:
    return Accuracy(
        table=table,
        left_out=left_out,
        points=len(errors),
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
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
                yield leave_points_out(name, points, by_knots, folds=100)


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
                yield leave_points_out(f"Helix {model} {gpu} {phase}", points, by_knots, folds=100)


def vidur_rows(data: Path) -> Iterator[Accuracy]:
    attention = tables.read_vidur_attention(
        data / "vidur_a100_attention_llama2-70b.csv.gz", model="llama2-70b", hardware="a100"
    )
    for phase in ("prefill", "decode"):
        points = [point for point in _points(attention, phase, 2) if point[1] > 0]
        yield leave_points_out(f"Vidur attention a100 {phase}", points, by_plane, folds=20)
    for path in sorted(data.glob("vidur_*_*llama-*.csv.gz")):
        rows = tables.read_vidur_layers(path)
        for tp in sorted({row.tp for row in rows}):
            points = [(tables.layer_features(row), row.seconds) for row in rows if row.tp == tp]
            name = f"{path.name.removesuffix('.csv.gz').replace('_', ' ', 1)} TP{tp} layer"
            yield leave_points_out(name.capitalize(), points, by_knots, folds=100)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent.parent / "tests" / "placement" / "data"
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        row
        for section in (splitwise_rows, helix_rows, vidur_rows, unseen_model_rows)
        for row in section(arguments.data)
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'table':58} {'left out':10} {'points':>6} {'median':>7} {'p90':>7}")
    for row in rows:
        errors = f"{row.median:7.1%} {row.p90:7.1%}"
        print(f"{row.table:58} {row.left_out:10} {row.points:6} {errors}")


if __name__ == "__main__":
    main()
