"""Random numbers as a function of (seed, position): any worker can go on with a stream.

Philox4x32-10, a counter-based generator: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. The seed is the key and the
position the counter; nothing is kept between draws. Knows numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 10
# Multipliers and Weyl increments of the paper's table 2 (4x32).
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = np.uint64(0x9E3779B9)
_KEY_STEP_1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox4x32: counters [n, 4], keys [n, 2] -> [n, 4], all uint32."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = keys.astype(np.uint64).T
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0  # 32 x 32 bits: never over 64
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _WORD) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _WORD) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0 = (k0 + _KEY_STEP_0) & _LOW
        k1 = (k1 + _KEY_STEP_1) & _LOW
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (seed, position): float64 [n], a multiple of 2**-53.

    Seeds count modulo 2**64. The position fills the counter's first two words; the other two
    are zero.
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    counters = np.stack((position & _LOW, position >> _WORD, zero, zero), axis=1)
    words = philox4x32(counters, np.stack((seed & _LOW, seed >> _WORD), axis=1))
    bits = (words[:, 0].astype(np.uint64) << _WORD) | words[:, 1]
    return (bits >> np.uint64(11)) * 2.0**-53
