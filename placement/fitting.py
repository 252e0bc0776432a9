"""Step times from measured points: non-negative least squares on the relative error.

Coefficients are never negative, so a fitted model is monotone. Repeats of one point are one
point (their median): they are noise, not information.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..engine.step_time import StepCoefficients, StepFeatures
from .latency import KnotStepTime, Limits

Matrix = NDArray[np.float64]
Point = tuple[StepFeatures, float]  # features, seconds


def medians(points: Sequence[Point]) -> list[Point]:
    """One point for each set of repeats."""
    groups: dict[StepFeatures, list[float]] = {}
    for features, seconds in points:
        groups.setdefault(features, []).append(seconds)
    return [(features, float(np.median(times))) for features, times in groups.items()]


def fit_coefficients(points: Sequence[Point]) -> StepCoefficients:
    """One linear piece."""
    table, seconds = _table(points)
    design = np.column_stack([np.ones(len(seconds)), table])
    base, new_token, attention, row, context = _relative_nnls(design, seconds)
    return StepCoefficients(
        base_s=base,
        new_token_s=new_token,
        attention_s=attention,
        decode_row_s=row,
        decode_context_s=context,
    )


def fit_knots(points: Sequence[Point], knots: Sequence[float] | None = None) -> KnotStepTime:
    """A monotone curve over tokens, and coefficients of attention and context.

    Without `knots`, those of the token counts that were measured, thinned to one in every
    factor of √2. Rows and chunks are told apart by one coefficient a row where both occur.
    """
    table, seconds = _table(points)
    tokens = table[:, 0] + table[:, 2]
    places = np.array(thinned(tokens) if knots is None else knots, dtype=np.float64)
    if len(places) < 2:
        places = np.array([places[0], places[0] + 1])
    widths = np.diff(places)
    # Column j is how far a token count reaches into segment j; its coefficient the slope there.
    reach = np.clip(tokens[:, None] - places[None, :-1], 0, widths[None, :])
    reach[:, -1] = np.maximum(tokens - places[-2], 0)
    both = bool(table[:, 0].any() and table[:, 2].any())
    row = table[:, 2] if both else np.zeros(len(seconds))
    design = np.column_stack([np.ones(len(seconds)), table[:, 1], row, table[:, 3], reach])
    base, attention, row_s, context, *slopes = _relative_nnls(design, seconds)
    curve = base + np.concatenate(([0.0], np.cumsum(np.array(slopes) * widths)))
    return KnotStepTime(
        places.tolist(),
        curve.tolist(),
        attention_s=attention,
        decode_row_s=row_s,
        decode_context_s=context,
    )


def limits_of(points: Sequence[Point]) -> Limits:
    """The largest of each feature that was measured."""
    largest = np.max([features for features, _ in points], axis=0)
    return Limits(
        new_tokens=largest[0],
        attention=largest[1],
        decode_rows=largest[2],
        decode_context=largest[3],
    )


def thinned(tokens: Matrix, factor: float = 2**0.5) -> list[float]:
    """Ascending token counts, neighbours at least `factor` apart, both ends kept."""
    unique = np.unique(tokens)
    kept = [float(unique[0])]
    for value in unique[1:-1]:
        if value >= kept[-1] * factor and value * factor <= unique[-1]:
            kept.append(float(value))
    return kept if len(unique) == 1 else [*kept, float(unique[-1])]


def _table(points: Sequence[Point]) -> tuple[Matrix, Matrix]:
    chosen = medians(points)
    assert chosen, "nothing to fit"
    features = np.array([features for features, _ in chosen], dtype=np.float64)
    return features, np.array([seconds for _, seconds in chosen], dtype=np.float64)


def _relative_nnls(design: Matrix, seconds: Matrix) -> list[float]:
    """Minimise Σ (prediction / measured − 1)², no coefficient negative, columns scaled to 1."""
    rows = design / seconds[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    solution, _ = nnls(rows / scale, np.ones(len(seconds)), maxiter=50 * design.shape[1])
    return (solution / scale).tolist()
