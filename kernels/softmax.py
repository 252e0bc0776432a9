"""Softmax of a row of float32, by whole vectors."""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# (an intrinsic is called without its typing context)

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .openmp import CONTRACT
from .simd import LANES, pointer
from .vectors import exp_row

ROW_PADDING = LANES  # floats behind a row's positions, which `softmax` may overwrite


@njit(fastmath=CONTRACT)
def softmax(row_at, count) -> None:  # noqa: ANN001
    """Softmax of `count` floats in place. Up to 15 behind them are overwritten."""
    whole = (count + LANES - 1) // LANES
    row = carray(pointer(row_at), (whole * LANES,), np.float32)
    largest = row[0]
    for i in range(count):
        largest = max(largest, row[i])
    for i in range(count, whole * LANES):
        row[i] = -np.inf
    inverse = np.float32(1.0) / exp_row(row_at, whole, largest)
    for i in range(count):
        row[i] *= inverse
