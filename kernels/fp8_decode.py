"""Attention of single query tokens over FP8 blocks, read where they lie. Numba, CPU.

As `paged_decode`, whose pack of arguments it takes (and `block_size * head_dim` floats more of
scratch): rows of keys and values are widened
into scratch that stays in the first cache, once for all query heads that share them. The readable
version is `reference.attend`.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# (an intrinsic is called without its typing context)

from __future__ import annotations

import functools

import numpy as np
from numba import carray, cfunc

from .fp8_rows import widen_e4m3
from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import add_weighted_rows, as_double, dot, narrow, pointer, widen
from .softmax import softmax


@functools.cache
def fp8_decode_body(head_dim: int, block_size: int, tile_bytes: int, wide: bool) -> Body:
    """Compile (or load) the body for one block shape; `wide`: queries in float32, else bfloat16."""
    dim, size, tile, item = head_dim, block_size, tile_bytes, 4 if wide else 2

    def body(p):  # noqa: ANN001, ANN202
        num_heads, kv_heads, num_tokens, window, row_len = p[1], p[2], p[3], p[4], p[5]
        q_stride, out_stride, table_width = p[6], p[7], p[8]
        scale, q_at, kv_at, out_at = np.float32(as_double(p[9])), p[10], p[11], p[12]
        thread, group = thread_num(), num_heads // kv_heads
        tokens = carray(pointer(p[13]), (num_tokens,), np.int64)
        rows = carray(pointer(p[14]), (num_tokens,), np.int64)
        contexts = carray(pointer(p[15]), (num_tokens,), np.int64)
        bounds = carray(pointer(p[16]), (p[0] + 1,), np.int64)
        span, heads = p[19], p[19] * group  # KV heads a task, and their query heads
        scores_at = p[17] + 4 * thread * (heads * row_len + (2 * heads + size) * dim)
        query_at = scores_at + 4 * heads * row_len
        sum_at = query_at + 4 * heads * dim
        tile_at = sum_at + 4 * heads * dim
        scores = carray(pointer(scores_at), (heads * row_len,), np.float32)
        sums = carray(pointer(sum_at), (heads * dim,), np.float32)
        for task in range(bounds[thread], bounds[thread + 1]):
            i, head = task // (kv_heads // span), task % (kv_heads // span) * span
            context = contexts[i]
            low = max(0, context - window) if window > 0 else 0
            first, end = low // size, (context + size - 1) // size
            table = carray(pointer(p[18] + 4 * rows[i] * table_width), (end,), np.int32)
            at = head * group * dim
            widen(q_at + item * (tokens[i] * q_stride + at), query_at, heads * dim, wide)
            for b in range(first, end):
                keys = kv_at + tile * (np.int64(table[b]) * 2 * kv_heads + head)
                begin, stop = max(low - b * size, 0), min(context - b * size, size)
                for s in range(span):
                    scale_at = keys + s * tile + size * dim
                    scales = carray(pointer(scale_at), (size,), np.uint8)
                    for t in range(begin, stop):
                        widen_e4m3(keys + s * tile + t * dim, tile_at, scales[t], dim)
                        column = (b - first) * size + t
                        for g in range(s * group, (s + 1) * group):
                            score = dot(query_at + 4 * g * dim, tile_at, dim, True)
                            scores[g * row_len + column] = score * scale
            for g in range(heads):
                softmax(scores_at + 4 * (g * row_len + low - first * size), context - low)
            for j in range(heads * dim):
                sums[j] = np.float32(0.0)
            for b in range(first, end):
                values = kv_at + tile * ((np.int64(table[b]) * 2 + 1) * kv_heads + head)
                begin, stop = max(low - b * size, 0), min(context - b * size, size)
                for s in range(span):
                    scale_at = values + s * tile + size * dim
                    scales = carray(pointer(scale_at), (size,), np.uint8)
                    for t in range(begin, stop):
                        row_at = tile_at + 4 * dim * (t - begin)
                        widen_e4m3(values + s * tile + t * dim, row_at, scales[t], dim)
                    for g in range(s * group, (s + 1) * group):
                        weights = scores_at + 4 * (g * row_len + (b - first) * size + begin)
                        sum_g = sum_at + 4 * g * dim
                        add_weighted_rows(sum_g, tile_at, weights, stop - begin, dim, True)
            narrow(sum_at, out_at + item * (tokens[i] * out_stride + at), heads * dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))
