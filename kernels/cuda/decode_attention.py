"""Attention of one query token a row over its KV blocks, split along the context.

A program takes all query heads of one KV head (padded to the 16 rows a tensor-core product needs),
so that K and V are read once, and one split of the row's context; a second kernel joins the splits
(flash-decoding: Dao et al. 2023, "Flash-Decoding for long-context inference"). Splits are cut on
the device from `lengths`: the grid depends on the batch's shape alone, as a CUDA graph requires.

The readable version is `reference.attend_rows`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..fp8 import E4M3
from .attention_tile import attend_tile, empty_state
from .e4m3 import head_stride, scales_or_layer

NO_WINDOW = 2**31 - 1
_CHUNK = tl.constexpr(16)  # splits that the join reads at a time


@triton.jit(do_not_specialize=["num_splits"])
def decode_kernel(
    out, log_sums, q, kv, scales, tables, lengths,
    q_stride, table_stride, scale, window, num_splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """`out` [rows, heads, dim]; where SPLIT, float32 [rows, heads, splits, dim], with the log2 of
    the softmax sums in `log_sums` [rows, heads, splits]. WIDE: products in float32, because
    Triton's interpreter is wrong in bfloat16. The rest as in `decode_attention`.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    head = kv_head * (HEADS // KV_HEADS) + member
    own = member < HEADS // KV_HEADS
    cells = own[:, None] & (dims < DIM)[None, :]
    query = tl.load(q + row * q_stride + head[:, None] * DIM + dims[None, :], mask=cells, other=0.0)
    if WIDE:
        query = query.to(tl.float32)

    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0)
    first_tile = first // TILE
    num_tiles = tl.cdiv(length, TILE) - first_tile
    per_split = tl.cdiv(num_tiles, num_splits)
    low = first_tile + split * per_split
    high = tl.minimum(low + per_split, first_tile + num_tiles)

    state = empty_state(GROUP_PAD, DIM_PAD)
    table = tables + row * table_stride
    position = low * TILE + tl.arange(0, TILE)
    coming = tl.load(table + position // BLOCK_SIZE, mask=position < length, other=0)
    for tile in range(low, high):
        # The next tile's blocks are looked up a tile ahead, so that K and V wait for no table.
        block = coming.to(tl.int64)
        position = tile * TILE + tl.arange(0, TILE)
        seen = (position < length) & (position >= first)
        ahead = position + TILE
        coming = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < length, other=0)
        state = attend_tile(
            query, state, kv, scales, block, position, seen, seen[None, :], scale, kv_head,
            KV_HEADS, DIM, DIM_PAD, BLOCK_SIZE, HEAD_STRIDE, SOFT_CAP, FP8, True,
        )  # fmt: skip

    maxima, sums, acc = state
    acc = acc / tl.where(sums > 0, sums, 1.0)[:, None]
    line = row * HEADS + head
    if SPLIT:
        line = line * num_splits + split
        tl.store(log_sums + line, maxima + tl.log2(sums), mask=own)
    tl.store(out + line[:, None] * DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=cells)


@triton.jit(do_not_specialize=["num_splits"])
def join_kernel(
    out,  # [rows, heads, dim]
    parts,  # float32 [rows, heads, splits, dim]
    log_sums,  # float32 [rows, heads, splits]
    num_splits,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # a power of two, at least 16
) -> None:
    line = tl.program_id(0).to(tl.int64)  # row and head
    dims = tl.arange(0, DIM_PAD)
    splits = tl.arange(0, MAX_SPLITS)
    here = log_sums + line * num_splits
    largest = tl.max(tl.load(here + splits, mask=splits < num_splits, other=float("-inf")), 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, num_splits, _CHUNK):
        split = start + tl.arange(0, _CHUNK)
        known = split < num_splits
        weights = tl.exp2(tl.load(here + split, mask=known, other=float("-inf")) - largest)
        at = (line * num_splits + split)[:, None] * DIM + dims[None, :]
        part = tl.load(parts + at, mask=known[:, None] & (dims < DIM)[None, :], other=0.0)
        total += tl.sum(weights, 0)
        acc += tl.sum(part * weights[:, None], 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + line * DIM + dims, acc.to(out.dtype.element_ty), mask=dims < DIM)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiling:
    """How the work is cut. `tile`: context positions a program reads at a time."""

    tile: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, head_dim: int, *, fp8: bool = False) -> DecodeTiling:
        """16 KiB of K and of V a tile (of 16-bit values), and two tiles in flight a program.

        Three programs share a multiprocessor: 192 KiB on their way, several times what its share
        of the memory's bandwidth needs to hide the latency. FP8 is widened in registers: more
        warps share that, and a third tile makes up for the smaller ones.
        """
        tile = 8192 // next_power_of_2(head_dim)
        if fp8:
            return cls(tile=tile, num_warps=8, num_stages=4)
        return cls(tile=tile, num_warps=4, num_stages=3)


def splits_for(num_rows: int, kv_heads: int, max_length: int, multiprocessors: int) -> int:
    """Splits that give every multiprocessor two programs, none shorter than 256 positions.

    `max_length` is the longest context the launch must serve (of the graph's bucket, not read
    from the device). At most 64.
    """
    wanted = -(-2 * multiprocessors // max(1, num_rows * kv_heads))
    return max(1, min(wanted, -(-max_length // 256), 64))


def decode_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    num_splits: int = 1,
    tiling: DecodeTiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of q [rows, heads, dim] (rows may be strided) over a layer's blocks, into `out`.

    `kv` [blocks, 2, kv_heads, block_size, dim]; `tables` int32 [rows, max_blocks], of which only
    the entries that cover visible positions are read; `lengths` int32 [rows] counts the query's
    own token, already appended; a row of length 0 gives zeros. `window` 0: the whole context.
    A float8_e4m3fn `kv` has its scales between its tiles (`kernels.fp8`). Nothing waits.
    """
    rows, heads, dim = q.shape
    assert q.stride(2) == 1 and q.stride(1) == dim, "heads lie side by side"
    _, _, kv_heads, block_size, _ = kv.shape
    fp8, split = kv.dtype == E4M3, num_splits > 1
    tiling = tiling or DecodeTiling.of(dim, fp8=fp8)
    if out is None:
        out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape
    if rows == 0:
        return out
    parts, log_sums = out, lengths
    if split:
        parts = out.new_empty((rows, heads, num_splits, dim), dtype=torch.float32)
        log_sums = out.new_empty((rows, heads, num_splits), dtype=torch.float32)
    decode_kernel[(kv_heads, num_splits, rows)](
        parts, log_sums, q, kv, scales_or_layer(kv), tables, lengths,
        q.stride(0), tables.stride(0), scale, window or NO_WINDOW, num_splits,
        HEADS=heads, KV_HEADS=kv_heads, GROUP_PAD=max(16, next_power_of_2(heads // kv_heads)),
        DIM=dim, DIM_PAD=next_power_of_2(dim), BLOCK_SIZE=block_size,
        HEAD_STRIDE=head_stride(kv), TILE=tiling.tile,
        SOFT_CAP=soft_cap, FP8=fp8, SPLIT=split,
        WIDE=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if split:
        _join(out, parts, log_sums)
    return out


def _join(out: Tensor, parts: Tensor, log_sums: Tensor) -> None:
    rows, heads, num_splits, dim = parts.shape
    join_kernel[(rows * heads,)](
        out, parts, log_sums, num_splits,
        DIM=dim, DIM_PAD=next_power_of_2(dim), MAX_SPLITS=max(16, next_power_of_2(num_splits)),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
