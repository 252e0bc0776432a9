"""exp over a row of float32, in a form that vectorises; libm's does not."""

from __future__ import annotations

import numpy as np
from numba import njit

from .openmp import CONTRACT

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)


@njit(fastmath=CONTRACT)
def exp_rows(x, shift, bits) -> None:  # noqa: ANN001
    """x[i] = exp(x[i] - shift) in place, arguments clamped to [-87, 88]; `bits` is int32 scratch.

    2^k times a degree-5 polynomial of the remainder, with the coefficients of Cephes' expf
    (Moshier, netlib.org/cephes): within 2 ulp.
    """
    count = len(x)
    for i in range(count):
        a = min(max(x[i] - shift, np.float32(-87.0)), np.float32(88.0))
        scaled = a * LOG2E
        k = np.int32(scaled + (np.float32(0.5) if scaled >= 0 else np.float32(-0.5)))
        r = a - np.float32(k) * LN2_HIGH - np.float32(k) * LN2_LOW
        y = np.float32(1.9875691500e-4)
        y = y * r + np.float32(1.3981999507e-3)
        y = y * r + np.float32(8.3334519073e-3)
        y = y * r + np.float32(4.1665795894e-2)
        y = y * r + np.float32(1.6666665459e-1)
        y = y * r + np.float32(5.0000001201e-1)
        x[i] = y * r * r + r + np.float32(1.0)
        bits[i] = (k + np.int32(127)) << np.int32(23)
    powers = bits.view(np.float32)
    for i in range(count):
        x[i] *= powers[i]
