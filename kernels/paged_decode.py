"""Attention of single query tokens over KV blocks, read where they lie. Numba, CPU.

Each token with a span of KV heads is a task, so that a block is read from end to end. Scores of
the whole context go to scratch rows, the softmax runs over them once, then the values are summed.
Nothing is gathered. The readable version is `reference.attend`.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# (an intrinsic is called without its typing context)

from __future__ import annotations

import functools

import numpy as np
from numba import carray, cfunc, njit

from .exponential import exp_rows
from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import add_weighted_rows, as_double, dot, narrow, pointer, widen


@njit(fastmath=CONTRACT)
def _softmax(scores, bits) -> None:  # noqa: ANN001
    """Softmax of a row in place."""
    largest = scores[0]
    for i in range(len(scores)):
        largest = max(largest, scores[i])
    exp_rows(scores, largest, bits)
    total = np.float32(0.0)
    for i in range(len(scores)):
        total += scores[i]
    inverse = np.float32(1.0) / total
    for i in range(len(scores)):
        scores[i] *= inverse


def scratch_floats(heads: int, head_dim: int, row_len: int) -> int:
    """Float32 scratch of a thread whose tasks span `heads` query heads and `row_len` positions."""
    return (heads + 1) * row_len + 2 * heads * head_dim


@functools.cache
def decode_body(head_dim: int, block_size: int, wide: bool) -> Body:
    """Compile (or load) the body for one block shape; `wide` reads float32, else bfloat16."""
    dim, size, item = head_dim, block_size, 4 if wide else 2
    tile_bytes = item * block_size * head_dim

    def body(p):  # noqa: ANN001, ANN202
        num_heads, kv_heads, num_tokens, window, row_len = p[1], p[2], p[3], p[4], p[5]
        q_stride, out_stride, table_width = p[6], p[7], p[8]
        scale, q_at, kv_at, out_at = np.float32(as_double(p[9])), p[10], p[11], p[12]
        thread, group = thread_num(), num_heads // kv_heads
        tokens = carray(pointer(p[13]), (num_tokens,), np.int64)
        rows = carray(pointer(p[14]), (num_tokens,), np.int64)
        contexts = carray(pointer(p[15]), (num_tokens,), np.int64)
        bounds = carray(pointer(p[16]), (p[0] + 1,), np.int64)
        span = p[19]  # KV heads a task
        floats = (span * group + 1) * row_len + 2 * span * group * dim
        scores_at = p[17] + 4 * thread * floats
        bits_at = scores_at + 4 * span * group * row_len
        query_at = bits_at + 4 * row_len
        sum_at = query_at + 4 * span * group * dim
        scores = carray(pointer(scores_at), (span * group * row_len,), np.float32)
        bits = carray(pointer(bits_at), (row_len,), np.int32)
        sums = carray(pointer(sum_at), (span * group * dim,), np.float32)
        for task in range(bounds[thread], bounds[thread + 1]):
            i, head = task // (kv_heads // span), task % (kv_heads // span) * span
            context = contexts[i]
            low = max(0, context - window) if window > 0 else 0
            first, end = low // size, (context + size - 1) // size
            table = carray(pointer(p[18] + 4 * rows[i] * table_width), (end,), np.int32)
            at = head * group * dim
            widen(q_at + item * (tokens[i] * q_stride + at), query_at, span * group * dim, wide)
            for b in range(first, end):
                tile = kv_at + tile_bytes * (np.int64(table[b]) * 2 * kv_heads + head)
                begin, stop = max(low - b * size, 0), min(context - b * size, size)
                for s in range(span):
                    for t in range(begin, stop):
                        key = tile + s * tile_bytes + item * t * dim
                        column = (b - first) * size + t
                        for g in range(s * group, (s + 1) * group):
                            score = dot(query_at + 4 * g * dim, key, dim, wide)
                            scores[g * row_len + column] = score * scale
            skip, count = low - first * size, context - low
            for g in range(span * group):
                start = g * row_len + skip
                _softmax(scores[start : start + count], bits)
            for j in range(span * group * dim):
                sums[j] = np.float32(0.0)
            for b in range(first, end):
                block = np.int64(table[b]) * 2 + 1
                begin, stop = max(low - b * size, 0), min(context - b * size, size)
                tile = kv_at + tile_bytes * (block * kv_heads + head) + item * begin * dim
                for g in range(span * group):
                    weights = scores_at + 4 * (g * row_len + (b - first) * size + begin)
                    values = tile + g // group * tile_bytes
                    add_weighted_rows(
                        sum_at + 4 * g * dim, values, weights, stop - begin, dim, wide
                    )
            narrow(sum_at, out_at + item * (tokens[i] * out_stride + at), span * group * dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))
