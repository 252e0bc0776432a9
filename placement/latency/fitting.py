"""Step times from measured points: non-negative least squares on the relative error.

Coefficients are never negative, so a fitted model is monotone. Repeats of one point are one
point (their median): they are noise, not information.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...engine.step_time import StepCoefficients, StepFeatures
from .phase_latency import KnotStepTime, Limits

Matrix = NDArray[np.float64]
Point = tuple[StepFeatures, float]  # features, seconds
CONTRADICTION = 0.5  # of another step's time, with no less to do
MOST_COMPARED = 2000  # points; contradictions are looked for pair by pair
TOLERANCE = 0.05  # relative error that is taken for noise
REWEIGHTINGS = 8
EVENNESS = 0.02  # relative error that a slope counts for which is double its neighbour's
ROW_TOKENS = (1.0, 0.5, 0.25, 0.1)  # what a decoding row may count for beside a chunk's token


def medians(points: Sequence[Point]) -> list[Point]:
    """One point for each set of repeats."""
    groups: dict[StepFeatures, list[float]] = {}
    for features, seconds in points:
        groups.setdefault(features, []).append(seconds)
    return [(features, float(np.median(times))) for features, times in groups.items()]


def contradicted(points: Sequence[Point]) -> list[Point]:
    """Points that others refute: a step with no less of anything cannot take far less time.

    The point in most contradictions goes first, until none is left. (Splitwise's Llama-2-70B at
    tensor parallel 2 took an eighth of the time for 64 prompts that it took for 32.)
    """
    features = np.array([features for features, _ in points], dtype=np.float64)
    seconds = np.array([seconds for _, seconds in points])
    more = np.all(features[:, None, :] >= features[None, :, :], axis=2)
    clash = more & (seconds[:, None] < CONTRADICTION * seconds[None, :])
    clash = clash | clash.T
    out = []
    while clash.any():
        worst = int(clash.sum(axis=1).argmax())
        out.append(points[worst])
        clash[worst, :] = clash[:, worst] = False
    return out


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


def fit_knots(points: Sequence[Point]) -> KnotStepTime:
    """A monotone curve over tokens, and coefficients of attention and context.

    Its knots are the token counts that were measured, thinned to one in every factor of √2.
    Where both rows and chunks occur, of the `ROW_TOKENS` the one that fits best is taken.
    """
    table, seconds = _table(points)
    both = bool(table[:, 0].any() and table[:, 2].any())
    fits = [
        _fit_curve(table, seconds, row_tokens) for row_tokens in (ROW_TOKENS if both else (1.0,))
    ]
    return min(fits, key=lambda fit: fit[0])[1]


def _fit_curve(table: Matrix, seconds: Matrix, row_tokens: float) -> tuple[float, KnotStepTime]:
    """The curve for one worth of a decoding row, with its mean relative error."""
    tokens = table[:, 0] + row_tokens * table[:, 2]
    places = np.array(thinned(tokens), dtype=np.float64)
    if len(places) < 2:
        places = np.array([places[0], places[0] + 1])
    widths = np.diff(places)
    # Column j is how far a token count reaches into segment j; its coefficient the slope there.
    reach = np.clip(tokens[:, None] - places[None, :-1], 0, widths[None, :])
    reach[:, -1] = np.maximum(tokens - places[-2], 0)
    row = table[:, 2] if table[:, 0].any() else np.zeros(len(seconds))
    design = np.column_stack([np.ones(len(seconds)), table[:, 1], row, table[:, 3], reach])
    # Rows tell the curve from attention by themselves.
    wishes = None if table[:, 2].any() else _even_slopes(tokens, seconds, places)
    solution = _relative_nnls(design, seconds, wishes)
    error = float(np.mean(np.abs(design @ solution / seconds - 1)))
    base, attention, row_s, context, *slopes = solution
    curve = base + np.concatenate(([0.0], np.cumsum(np.array(slopes) * widths)))
    return error, KnotStepTime(
        places.tolist(),
        curve.tolist(),
        attention_s=attention,
        decode_row_s=row_s,
        decode_context_s=context,
        row_tokens=row_tokens,
    )


def _even_slopes(tokens: Matrix, seconds: Matrix, places: Matrix) -> Matrix:
    """Rows that ask neighbouring slopes to be alike, by far weaker than any point.

    Where prompts came one at a time, attention goes with tokens, and points alone do not tell a
    long prompt's attention from a bend of the curve: many short prompts would then be predicted at
    half their time.
    """
    order = np.argsort(tokens)
    longest_s = np.interp(places, tokens[order], np.maximum.accumulate(seconds[order]))
    weights = EVENNESS * places[1:-1] / longest_s[1:-1]
    segments = len(places) - 1
    rows = np.zeros((segments - 1, 4 + segments))
    for j, weight in enumerate(weights):
        rows[j, 4 + j : 6 + j] = -weight, weight
    return rows


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
    """Ascending counts, neighbours at least `factor` apart, both ends kept."""
    unique = np.unique(tokens)
    kept = [float(unique[0])]
    for value in unique[1:-1]:
        if value >= kept[-1] * factor and value * factor <= unique[-1]:
            kept.append(float(value))
    return kept if len(unique) == 1 else [*kept, float(unique[-1])]


def _table(points: Sequence[Point]) -> tuple[Matrix, Matrix]:
    chosen = medians(points)
    if len(chosen) <= MOST_COMPARED:
        refuted = set(contradicted(chosen))
        chosen = [point for point in chosen if point not in refuted]
    assert chosen, "nothing to fit"
    features = np.array([features for features, _ in chosen], dtype=np.float64)
    return features, np.array([seconds for _, seconds in chosen], dtype=np.float64)


def _relative_nnls(design: Matrix, seconds: Matrix, wishes: Matrix | None = None) -> list[float]:
    """Minimise the relative errors, no coefficient negative, columns scaled to 1. `wishes`: rows
    that should come out near 0.

    Errors far beyond `TOLERANCE` count by their size, not its square (reweighted least squares),
    so that a point that was measured wrong does not bend the rest.
    """
    from scipy.optimize import nnls  # half of a worker's start, if it stood above; it never fits

    rows = design / seconds[:, None]
    rows /= (scale := np.maximum(np.abs(rows).max(axis=0), 1e-300))
    wished = np.empty((0, design.shape[1])) if wishes is None else wishes / scale
    weights, zeros = np.ones(len(seconds)), np.zeros(len(wished))
    solution = np.zeros(design.shape[1])
    for _ in range(REWEIGHTINGS):
        solution, _ = nnls(
            np.vstack((rows * weights[:, None], wished)),
            np.concatenate((weights, zeros)),
            maxiter=50 * design.shape[1],
        )
        weights = (1 + ((rows @ solution - 1) / TOLERANCE) ** 2) ** -0.25
    return (solution / scale).tolist()
