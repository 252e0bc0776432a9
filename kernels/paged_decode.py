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

from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import LANES, add_weighted_rows, as_double, dot, narrow, pointer, widen
from .softmax import softmax
from .vectors import add_weighted_rows_twice, dot_rows, prefetch

AHEAD = 2  # blocks that are asked for before they are read


def scratch_floats(heads: int, head_dim: int, row_len: int) -> int:
    """Float32 scratch of a thread whose tasks span `heads` query heads and `row_len` positions."""
    return heads * (row_len + 2 * head_dim)


@njit(inline="always")
def _ask_for(block_at, low, high, kv_heads, tile_bytes) -> None:  # noqa: ANN001
    """Keys and values of the heads [low, high) of a block: else each begins with a wait."""
    for head in range(low, high):
        prefetch(block_at + head * tile_bytes, tile_bytes)
        prefetch(block_at + (kv_heads + head) * tile_bytes, tile_bytes)


@njit(inline="always")
def _score(query, keys, row_at, begin, stop, scale, in_sixteens, size, dim, wide) -> None:  # noqa: ANN001
    """Scores of one query over a block. Sixteen at a time they are those of the whole block, also
    of positions outside [begin, stop), which nobody reads."""
    item = 4 if wide else 2
    if in_sixteens:
        for t in range(0, size, LANES):
            dot_rows(query, keys + item * t * dim, row_at + 4 * t, scale, dim, wide)
    else:
        row = carray(pointer(row_at), (size,), np.float32)
        for t in range(begin, stop):
            row[t] = dot(query, keys + item * t * dim, dim, wide) * scale


@functools.cache
def decode_body(head_dim: int, block_size: int, wide: bool) -> Body:
    """Compile (or load) the body for one block shape; `wide` reads float32, else bfloat16."""
    dim, size, item = head_dim, block_size, 4 if wide else 2
    tile_bytes = item * block_size * head_dim
    in_sixteens = block_size % LANES == 0 and head_dim % LANES == 0
    pairs_fit = head_dim % LANES == 0 and head_dim <= 128  # sums of two heads, in registers

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
        scores_at = p[17] + 4 * thread * span * group * (row_len + 2 * dim)
        query_at = scores_at + 4 * span * group * row_len
        sum_at = query_at + 4 * span * group * dim
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
                ahead = kv_at + tile_bytes * np.int64(table[min(b + AHEAD, end - 1)]) * 2 * kv_heads
                _ask_for(ahead, head, head + span, kv_heads, tile_bytes)
                for g in range(span * group):
                    query, key = query_at + 4 * g * dim, tile + g // group * tile_bytes
                    row_at = scores_at + 4 * (g * row_len + (b - first) * size)
                    _score(query, key, row_at, begin, stop, scale, in_sixteens, size, dim, wide)
            skip, count = low - first * size, context - low
            for g in range(span * group):
                softmax(scores_at + 4 * (g * row_len + skip), count)
            for j in range(span * group * dim):
                sums[j] = np.float32(0.0)
            for b in range(first, end):
                block = np.int64(table[b]) * 2 + 1
                begin, stop = max(low - b * size, 0), min(context - b * size, size)
                tile = kv_at + tile_bytes * (block * kv_heads + head) + item * begin * dim
                step = 2 if pairs_fit and group % 2 == 0 else 1
                for g in range(0, span * group, step):
                    weights = scores_at + 4 * (g * row_len + (b - first) * size + begin)
                    values, sum_g = tile + g // group * tile_bytes, sum_at + 4 * g * dim
                    if step == 2:
                        add_weighted_rows_twice(
                            sum_g, values, weights, row_len, stop - begin, dim, wide
                        )
                    else:
                        add_weighted_rows(sum_g, values, weights, stop - begin, dim, wide)
            narrow(sum_at, out_at + item * (tokens[i] * out_stride + at), span * group * dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))
