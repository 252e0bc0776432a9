"""Per-token steps around the matrix products, each in one pass over memory. Numba, CPU.

RMSNorm (with the residual sum before it), SiLU times up, rotary positions with the KV append.
Inputs are float32 or bfloat16 (`wide` or not); sums are in float32 and rounded where the model's
own dtype rounds. The readable versions are in `reference`.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# (an intrinsic is called without its typing context)

from __future__ import annotations

import functools
import math

import numpy as np
from numba import carray, cfunc, njit

from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import as_double, dot, narrow, pointer, widen
from .vectors import silu_mul_row


@functools.cache
def rms_norm_body(wide: bool) -> Body:
    """`out = weight * round(h / rms(h))`, h = x, or the residual after x was added to it."""
    item = 4 if wide else 2

    def body(p):  # noqa: ANN001, ANN202
        num_rows, dim, eps = p[1], p[2], as_double(p[3])
        x_at, residual_at, weight_at, out_at = p[4], p[5], p[6], p[7]
        thread = thread_num()
        row_at = p[8] + 8 * thread * dim
        h = carray(pointer(row_at), (dim,), np.float32)
        other = carray(pointer(row_at + 4 * dim), (dim,), np.float32)
        for i in range(num_rows * thread // p[0], num_rows * (thread + 1) // p[0]):
            step = item * i * dim
            widen(x_at + step, row_at, dim, wide)
            if residual_at != 0:
                widen(residual_at + step, row_at + 4 * dim, dim, wide)
                for j in range(dim):
                    h[j] += other[j]
                narrow(row_at, residual_at + step, dim, wide)
                widen(residual_at + step, row_at, dim, wide)
            squares = np.float32(0.0)
            for j in range(dim):
                squares += h[j] * h[j]
            factor = np.float32(1.0 / math.sqrt(squares / dim + eps))
            for j in range(dim):
                h[j] *= factor
            narrow(row_at, out_at + step, dim, wide)
            widen(out_at + step, row_at, dim, wide)
            widen(weight_at, row_at + 4 * dim, dim, wide)
            for j in range(dim):
                h[j] *= other[j]
            narrow(row_at, out_at + step, dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))


@functools.cache
def silu_mul_body(wide: bool) -> Body:
    """`out = round(gate / (1 + exp(-gate))) * up` over rows of [gate, up]."""
    item = 4 if wide else 2

    def body(p):  # noqa: ANN001, ANN202
        num_rows, dim, x_at, out_at = p[1], p[2], p[3], p[4]
        thread = thread_num()
        for i in range(num_rows * thread // p[0], num_rows * (thread + 1) // p[0]):
            gate_at = x_at + item * 2 * i * dim
            silu_mul_row(gate_at, gate_at + item * dim, out_at + item * i * dim, dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))


@njit(fastmath=CONTRACT)
def _rotate(x, cos_sin, half) -> None:  # noqa: ANN001
    """Rotate pairs (x[j], x[j + half]) in place by angles whose cos, sin are `cos_sin`."""
    first, second = x[:half], x[half:]
    cos, sin = cos_sin[:half], cos_sin[half:]
    for j in range(half):
        a, b = first[j], second[j]
        first[j] = a * cos[j] - b * sin[j]
        second[j] = b * cos[j] + a * sin[j]


@functools.cache
def rope_append_body(head_dim: int, wide: bool) -> Body:
    """Normalise (optionally) and rotate q in place and k into its block; copy v into its block.

    Without a layer of blocks (address 0), k is written back in place as q is.
    """
    dim, item, half = head_dim, 4 if wide else 2, head_dim // 2

    def body(p):  # noqa: ANN001, ANN202
        num_tokens, num_heads, kv_heads, size = p[1], p[2], p[3], p[4]
        eps, q_norm_at, k_norm_at, qkv_at, kv_at = as_double(p[5]), p[6], p[7], p[8], p[9]
        slots = carray(pointer(p[10]), (num_tokens,), np.int64)
        angles = carray(pointer(p[11]), (num_tokens,), np.int64)
        table_at = p[12]
        thread = thread_num()
        row_at = p[13] + 8 * thread * dim
        x = carray(pointer(row_at), (dim,), np.float32)
        weight = carray(pointer(row_at + 4 * dim), (dim,), np.float32)
        width = (num_heads + 2 * kv_heads) * dim
        for i in range(num_tokens * thread // p[0], num_tokens * (thread + 1) // p[0]):
            block, place = slots[i] // size, slots[i] % size
            for head in range(num_heads + 2 * kv_heads):
                source = qkv_at + item * (i * width + head * dim)
                target = source
                if head >= num_heads and kv_at != 0:
                    side = block * 2 * kv_heads + head - num_heads
                    target = kv_at + item * dim * (side * size + place)
                widen(source, row_at, dim, wide)
                norm_at = q_norm_at if head < num_heads else k_norm_at
                is_value = head >= num_heads + kv_heads
                if norm_at != 0 and not is_value:
                    squares = dot(row_at, row_at, dim, True)
                    factor = np.float32(1.0 / math.sqrt(squares / dim + eps))
                    for j in range(dim):
                        x[j] *= factor
                    narrow(row_at, source, dim, wide)
                    widen(source, row_at, dim, wide)
                    widen(norm_at, row_at + 4 * dim, dim, wide)
                    for j in range(dim):
                        x[j] *= weight[j]
                    narrow(row_at, source, dim, wide)
                    widen(source, row_at, dim, wide)
                if table_at != 0 and not is_value:
                    angle_at = table_at + 4 * dim * angles[i]
                    _rotate(x, carray(pointer(angle_at), (dim,), np.float32), half)
                narrow(row_at, target, dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))
