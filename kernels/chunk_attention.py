"""Attention of whole chunks over KV blocks: tiles of queries against all they see. Numba, CPU.

A task widens one KV head's context once, keys transposed, and runs tiles of `TILE` queries over it:
scores, softmax over whole rows, weighted sum of values. Positions that no query of a tile sees
are left out. The readable version is `reference.attend`.
"""

# pyright: reportCallIssue=false, reportPrivateImportUsage=false
# ruff: noqa: ANN001
# (an intrinsic is called without its typing context; Numba infers the arguments' types)

from __future__ import annotations

import functools

import numpy as np
from numba import carray, cfunc, njit

from .openmp import BODY, CONTRACT, Body, thread_num
from .simd import LANES, as_double, narrow, pointer, widen
from .softmax import softmax
from .vectors import product_tile

TILE = 8  # queries
COLUMNS = 2 * LANES  # positions of a product tile


def takes(head_dim: int) -> bool:
    """Whether heads of this size can be cut into vectors."""
    return head_dim % LANES == 0


def chunk_scratch_floats(context: int, head_dim: int) -> int:
    """Float32 scratch of a thread whose longest chunk sees `context` positions."""
    columns = _columns(context)
    # Rows of keys and scores are apart by no power of two, or they would share cache sets.
    return (2 * columns + LANES) * head_dim + TILE * (columns + LANES + 2 * head_dim)


def _columns(context: int) -> int:
    return (context + COLUMNS - 1) // COLUMNS * COLUMNS


@njit(inline="always")
def _widen_context(
    kv_at, table, begin, end, head, kv_heads, keys, values_at, row_at, size, dim, wide
) -> None:
    """One KV head's positions [begin, end) as float32: `keys` [dim, positions], values by row.

    What fills up the last tile's columns is zero. `row_at` is scratch for a row.
    """
    item = 4 if wide else 2
    tile_bytes = item * size * dim
    row = carray(pointer(row_at), (dim,), np.float32)
    for b in range(begin // size, len(table)):
        tile = kv_at + tile_bytes * (np.int64(table[b]) * 2 * kv_heads + head)
        stop, at = min(end - b * size, size), b * size - begin
        for t in range(stop):
            widen(tile + item * t * dim, row_at, dim, wide)
            for j in range(dim):
                keys[j, at + t] = row[j]
        widen(tile + kv_heads * tile_bytes, values_at + 4 * at * dim, stop * dim, wide)
    seen = end - begin
    columns = (seen + COLUMNS - 1) // COLUMNS * COLUMNS
    keys[:, seen:columns] = np.float32(0.0)
    rest = carray(pointer(values_at + 4 * seen * dim), ((columns - seen) * dim,), np.float32)
    rest[:] = np.float32(0.0)


@njit(inline="always")
def _widen_queries(q_at, q_stride, rows, scale, query_at, dim, wide) -> None:
    """`rows` of the tile's queries, scaled, as float32 [TILE, dim]; the others are zero."""
    queries = carray(pointer(query_at), (TILE * dim,), np.float32)
    queries[:] = np.float32(0.0)
    for r in range(rows):
        widen(q_at + (4 if wide else 2) * r * q_stride, query_at + 4 * r * dim, dim, wide)
    for j in range(TILE * dim):
        queries[j] *= scale


@njit(inline="always")
def _soften(scores_at, row_len, width, seen, most, window) -> None:
    """Softmax of a tile's rows; row r sees `seen` + r of its columns, the last `window` of them."""
    for r in range(TILE):
        row_at = scores_at + 4 * r * row_len
        high = min(seen + r, most)
        low = max(0, high - window) if window > 0 else 0
        softmax(row_at + 4 * low, high - low)
        row = carray(pointer(row_at), (width,), np.float32)
        row[:low] = np.float32(0.0)
        row[high:width] = np.float32(0.0)


@functools.cache
def chunk_body(head_dim: int, block_size: int, wide: bool) -> Body:
    """Compile (or load) the body for one block shape; `wide` reads float32, else bfloat16.

    A chunk is five integers: its first token, number of tokens, start, the first position that
    any of its queries sees (a multiple of `block_size`), address of its int32 block table.
    """
    dim, size, item = head_dim, block_size, 4 if wide else 2

    def body(p):  # noqa: ANN202
        num_chunks, num_heads, kv_heads, parts, window = p[1], p[2], p[3], p[4], p[5]
        q_stride, out_stride, scale, longest = p[6], p[7], np.float32(as_double(p[8])), p[14]
        thread, group, row_len = thread_num(), num_heads // kv_heads, longest + LANES
        chunks = carray(pointer(p[12]), (num_chunks, 5), np.int64)
        keys_at = p[13] + 4 * thread * (row_len * (dim + TILE) + (longest + 2 * TILE) * dim)
        values_at = keys_at + 4 * row_len * dim
        scores_at = values_at + 4 * longest * dim
        query_at = scores_at + 4 * TILE * row_len
        sum_at = query_at + 4 * TILE * dim
        keys = carray(pointer(keys_at), (dim, row_len), np.float32)
        for task in range(thread, num_chunks * kv_heads * parts, p[0]):
            chunk, head, part = task // (kv_heads * parts), task // parts % kv_heads, task % parts
            first, count, start = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
            begin, end = chunks[chunk, 3], start + count
            table = carray(pointer(chunks[chunk, 4]), ((end + size - 1) // size,), np.int32)
            _widen_context(
                p[10], table, begin, end, head, kv_heads, keys, values_at, sum_at, size, dim, wide
            )
            for number in range(part, group * ((count + TILE - 1) // TILE), parts):
                q_head, i = head * group + number % group, number // group * TILE
                rows = min(TILE, count - i)
                q_at = p[9] + item * ((first + i) * q_stride + q_head * dim)
                _widen_queries(q_at, q_stride, rows, scale, query_at, dim, wide)
                high = start + i + rows - begin  # one behind what the last query sees
                low = 0
                if window > 0:
                    low = max(0, start + i + 1 - window - begin) // COLUMNS * COLUMNS
                width = (high - low + COLUMNS - 1) // COLUMNS * COLUMNS
                for j in range(0, width, COLUMNS):
                    columns_at, scores = keys_at + 4 * (low + j), scores_at + 4 * j
                    product_tile(scores, row_len, query_at, dim, columns_at, row_len, dim, TILE, 2)
                _soften(scores_at, row_len, width, start + i + 1 - begin - low, high - low, window)
                for j in range(0, dim, LANES):
                    values, sums = values_at + 4 * (low * dim + j), sum_at + 4 * j
                    product_tile(sums, dim, scores_at, row_len, values, dim, width, TILE, 1)
                for r in range(rows):
                    target = p[11] + item * ((first + i + r) * out_stride + q_head * dim)
                    narrow(sum_at + 4 * r * dim, target, dim, wide)

    return Body(cfunc(BODY, cache=True, fastmath=CONTRACT)(body))
